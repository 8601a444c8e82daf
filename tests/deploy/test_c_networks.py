"""Networks in C against PyTorch in float64: the zoo, odd graphs, random small networks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from c_builds import FLAGS, SANITIZED, alive, check, knows, needs_compiler, on_arm, self_test, write
from torch import Tensor, nn

from clicktrain.inference.capture import capture
from clicktrain.inference.program import NotPortableError
from clicktrain.models import create_model

torch.set_num_threads(1)
pytestmark = [
    needs_compiler,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.mark.long
@pytest.mark.parametrize("density", [1.0, 0.15])
def test_a_residual_network(density: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(alive(create_model("resnet8", num_classes=10, width=0.5), density), (3, 12, 12), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", ["vgg11", "mobilenet_v1", "mobilenet_v3_small", "cifarnet", "resnet50"])
def test_networks_of_the_zoo(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=10, width=0.25, stem="cifar")
    check(alive(model, 0.3), (3, 32, 32), tmp_path, (1, 9))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v3_large"])
def test_networks_for_large_images(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=7, width=0.25, stem="imagenet")
    check(alive(model, 0.3), (3, 72, 65), tmp_path, (1, 9))


class Odd(nn.Module):
    """Spellings, and operations between which nothing can be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, (3, 1), stride=(2, 1), padding=(1, 0), groups=2)
        self.dilated = nn.Conv2d(12, 12, 3, padding=2, dilation=2, padding_mode="zeros")
        self.same = nn.Conv2d(12, 6, 2, padding="same")
        self.strided = nn.Conv2d(6, 6, 3, stride=3, dilation=2, padding=2, bias=False)
        self.head = nn.Linear(7 * 6, 9)
        self.register_buffer("shift", torch.linspace(-1, 1, 8)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(F.relu(self.first(x)))) + self.shift
        left, right = x.chunk(2, dim=1)
        x = torch.cat([right * 0.5, torch.sigmoid(left) - right], dim=1)
        x = self.grouped(F.pad(x, (1, 0, 0, 2)))
        y = self.dilated(x)
        x = F.leaky_relu(x + y, 0.2) + F.hardswish(y)
        x = F.avg_pool2d(x, 3, stride=2, padding=1, ceil_mode=True, count_include_pad=False)
        gate = x.mean((2, 3), keepdim=True).tanh()
        x = self.same(F.elu(x * gate, 0.7))
        z = F.max_pool2d(x[:, :, 1:, ::2], (3, 2), stride=1, padding=1)
        x = F.silu(self.strided(x)).amax((2, 3))
        z = F.adaptive_avg_pool2d(z, (2, 3)).reshape(z.shape[0], -1)
        return F.softmax(self.head(torch.cat([-x, z], dim=1)), dim=1)


def test_odd_operations(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(alive(Odd()), (3, 11, 13), tmp_path)


class Unfolded(nn.Module):
    """Values that are read twice, and sums of a value with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, affine=False)
        self.point = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.norm(y)
        y = y + y + self.conv(z)
        z = self.point(y) + self.point(z)
        return torch.relu(z) + y - 2


def test_what_is_read_twice_is_not_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(alive(Unfolded(), 0.5), (4, 5, 6), tmp_path)


def random_network(seed: int) -> tuple[nn.Module, tuple[int, int, int]]:
    draw = random.Random(seed)
    channels, size = draw.choice([1, 3, 5, 16]), [draw.randint(3, 21), draw.randint(3, 21)]
    shape = (channels, *size)
    layers: list[nn.Module] = []
    for _ in range(draw.randint(1, 3)):
        kernel = [draw.randint(1, min(5, s)) for s in size]
        padding = [draw.randint(0, k) for k in kernel]
        stride = [draw.randint(1, 3) for _ in size]
        dilation = [
            draw.randint(1, 2) if k * 2 <= s + p else 1 for k, s, p in zip(kernel, size, padding, strict=True)
        ]
        groups = draw.choice([1, 1, channels])
        filters = groups * draw.randint(1, max(1, 20 // groups))
        layers.append(
            nn.Conv2d(channels, filters, kernel, stride, padding, dilation, groups, draw.random() < 0.5)
        )
        if draw.random() < 0.7:
            layers.append(nn.BatchNorm2d(filters))
        layers.append(draw.choice([nn.ReLU, nn.SiLU, nn.Identity, nn.Hardsigmoid])())
        channels = filters
        size = [(s + 2 * p - d * (k - 1) - 1) // t + 1
                for s, p, d, k, t in zip(size, padding, dilation, kernel, stride, strict=True)]  # fmt: skip
    layers += [nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(2 * channels, 5)]
    return nn.Sequential(*layers), shape


@pytest.mark.parametrize("seed", range(3))
def test_random_networks(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    model, shape = random_network(seed)
    check(alive(model, [1.0, 0.4, 0.1][seed % 3], seed), shape, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 60))
def test_more_random_networks(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    model, shape = random_network(seed)
    check(alive(model, [1.0, 0.4, 0.1][seed % 3], seed), shape, tmp_path)


def some_network(name: str) -> tuple[nn.Module, tuple[int, int, int], float]:
    """A network by name, the shape of its images and the share of weights that it keeps."""
    torch.manual_seed(0)
    if name == "odd":
        return Odd(), (3, 11, 13), 0.5
    if name == "unfolded":
        return Unfolded(), (4, 5, 6), 0.5
    if name.startswith("random"):
        seed = int(name.removeprefix("random"))
        torch.manual_seed(seed)
        return *random_network(seed), [1.0, 0.4, 0.1][seed % 3]
    return create_model(name, num_classes=10, width=0.25, stem="cifar"), (3, 32, 32), 0.3


NETWORKS = (
    "resnet8", "resnet50", "vgg11", "mobilenet_v1", "mobilenet_v3_small", "cifarnet", "odd", "unfolded",
    *(f"random{seed}" for seed in range(100, 124)),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_under_the_sanitizers(name: str, tmp_path: Path) -> None:
    """Every set of instructions of this processor, one image and batches: no byte elsewhere."""
    model, shape, density = some_network(name)
    write(alive(model, density), shape, tmp_path)
    done = self_test(tmp_path, tmp_path, SANITIZED, ASAN_OPTIONS="detect_leaks=1")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("level", ["native", "x86-64-v3", "x86-64"])
@pytest.mark.parametrize(
    "name", ["resnet8", "mobilenet_v3_small", "odd", "random200", "random201", "random202"]
)
def test_networks_built_for_one_level_of_instructions(name: str, level: str, tmp_path: Path) -> None:
    if not knows(f"-march={level}"):
        pytest.skip(f"the compiler does not know -march={level}")
    model, shape, density = some_network(name)
    write(alive(model, density), shape, tmp_path)
    done = self_test(tmp_path, tmp_path, (*FLAGS, f"-march={level}"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet8", "mobilenet_v3_small", "odd", "unfolded", "random300", "random301"]
)
def test_networks_on_arm(name: str, tmp_path: Path) -> None:
    """NEON is known to be right; how fast it is, an emulator cannot say."""
    model, shape, density = some_network(name)
    write(alive(model, density), shape, tmp_path)
    done = on_arm(tmp_path, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neon" in done.stdout


def test_layers_without_any_weight(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3, padding=1), nn.Flatten(), nn.Linear(63, 3)
    )
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight[1:].zero_()
        model[4].weight[1].zero_()
        model[4].weight[:, ::2].zero_()
    check(model, (2, 5, 5), tmp_path)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2)
        return F.softmax(y.transpose(1, 2) @ y, dim=-1)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class TwoResults(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x * 2


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Attention(), r"transpose"),
        (Normed(), r"group_norm.*\(norm\) has no form in C"),
        (TwoResults(), "one output"),
        (nn.ConvTranspose2d(4, 4, 2), "conv_transpose2d"),
        (nn.BatchNorm2d(4, track_running_stats=False), "statistics of the batch|batch_norm"),
    ],
)
def test_what_has_no_form_in_c_is_named(model: nn.Module, why: str) -> None:
    with pytest.raises(NotPortableError, match=why):
        capture(model, (4, 6, 6))


@pytest.mark.parametrize("size", [(5, 70), (40, 3), (1, 33), (4, 4), (32, 32)])
def test_images_that_are_wide_or_small(size: tuple[int, int], tmp_path: Path) -> None:
    """Each form of a region: rows, copies by row, at once and by tap; strips, several tiles and passes."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 40, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(40, 6, 3, padding=1),
        nn.Conv2d(6, 4, 3, 2, 1),
    ]
    check(alive(nn.Sequential(*layers), 0.3), (3, *size), tmp_path, (1, 9))
