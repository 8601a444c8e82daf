"""int8 numbers in exported networks: exact sums of rounded inputs and weights, ranges found on images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from c_builds import CHOICES, SANITIZED, Finished, Library, build, needs_compiler, plan_file, self_test, write
from torch import Tensor, nn

import clicktrain
from clicktrain.deploy import export_c
from clicktrain.errors import UserError
from clicktrain.inference.calibration import calibrate, int8_inputs
from clicktrain.inference.capture import capture
from clicktrain.inference.interpreter import run
from clicktrain.models import create_model

torch.set_num_threads(1)
pytestmark = [
    needs_compiler,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
INT8 = "avx512-int8"


PATTERNS = (0b000011011, 0b010111000, 0b110110000, 0b000000111)
"""Sets of taps, a bit each."""


class Layer(nn.Module):
    """One sparse convolution of what is not negative, with a sum and an activation behind it or without."""

    def __init__(
        self, channels: int, filters: int, kernel: int, stride: int, *, density: float, adds: bool = False
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(channels)
        self.conv = nn.Conv2d(channels, filters, kernel, stride, kernel // 2)
        shape = (filters, channels, kernel, kernel)
        mask = torch.rand(shape, generator=generator) < density
        if kernel == 3:  # few sets of taps: there is code for each of them
            patterns = torch.tensor(PATTERNS)[torch.randint(len(PATTERNS), shape[:2], generator=generator)]
            kept = torch.rand(shape[:2], generator=generator) < 2 * density
            odd = mask[0, :2].clone()
            mask = (patterns.unsqueeze(2) >> torch.arange(9) & 1).bool().view(shape) & kept[:, :, None, None]
            mask[0, :2] = odd
        self.adds = adds
        with torch.no_grad():
            self.conv.weight.mul_(mask)
            self.conv.weight[filters // 2] = 0  # a filter of nothing

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        y: Tensor = self.conv(x)
        return torch.relu(y + x) if self.adds else y


def reference(layer: Layer, images: Tensor, most: float) -> Tensor:
    """As the docstring of `clicktrain.inference.calibration` has it, weight by weight, in integers."""
    weight = layer.conv.weight.detach().double()
    steps = weight.abs().amax((1, 2, 3), keepdim=True) / 127
    whole = torch.where(steps > 0, (weight / steps.clamp_min(1e-30)).round(), 0.0)
    x = torch.relu(images.double())
    read = (x * 255 / most).round().clamp(0, 255)
    sums = F.conv2d(read, whole, None, layer.conv.stride, layer.conv.padding)
    assert layer.conv.bias is not None
    y = sums * steps.view(1, -1, 1, 1) * (most / 255) + layer.conv.bias.detach().double().view(1, -1, 1, 1)
    return torch.relu(y + x) if layer.adds else y


def steps_of(shape: tuple[int, ...], most: float) -> Tensor:
    """Images in steps of int8, some negative and some beyond the largest: no rounding is by chance."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-40, 300, shape, generator=generator).float() * (most / 255)


CASES = {
    "3x3": (Layer(19, 14, 3, 1, density=0.3), (12, 9)),
    "3x3 added": (Layer(16, 16, 3, 1, density=0.4, adds=True), (8, 8)),
    "3x3 whole": (Layer(30, 12, 3, 1, density=0.3), (4, 4)),
    "3x3 strided": (Layer(11, 20, 3, 2, density=0.4), (17, 21)),
    "3x3 strided whole": (Layer(9, 13, 3, 2, density=0.4), (8, 8)),
    "3x3 wide": (Layer(6, 7, 3, 1, density=0.5), (7, 50)),
    "3x3 strided wide": (Layer(5, 6, 3, 2, density=0.5), (9, 125)),
    "3x3 in passes": (Layer(600, 9, 3, 1, density=0.1), (6, 6)),
    "1x1": (Layer(21, 15, 1, 1, density=0.4), (7, 5)),
    "1x1 added": (Layer(18, 18, 1, 1, density=0.5, adds=True), (9, 9)),
    "1x1 strided": (Layer(25, 8, 1, 2, density=0.4), (18, 14)),
    "1x1 in passes": (Layer(700, 6, 1, 1, density=0.2), (10, 10)),
}

QUICK = ("3x3 added", "3x3 strided", "1x1 added")


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in CASES]
)
def test_sums_are_those_of_integers(case: str, tmp_path: Path) -> None:
    layer, size = CASES[case]
    channels, most = layer.conv.in_channels, 3.7
    first = capture(layer, (channels, *size)).ops[0].output.name
    program = write(layer, (channels, *size), tmp_path, ranges={first: most})
    library = Library(build(tmp_path))
    if INT8 not in library.names():
        pytest.skip("this processor does not multiply int8 numbers")
    images = steps_of((32, channels, *size), most)
    expected = reference(layer, images, most).flatten(1)
    scale = float(expected.abs().max())
    rounded = float((layer(images).detach().flatten(1).double() - expected).abs().max())
    assert rounded > 1e-3 * scale, "rounding shows, or nothing would be tested"
    forms = ("columns", "windows") if layer.conv.kernel_size == (3, 3) else ("pointwise, L1", "pointwise, L2")
    for form in forms:
        plan = plan_file(tmp_path, program, INT8, CHOICES[form])
        # Blocks of 16 images run by windows, single images by columns; what is left over, by another form.
        for batch in {"columns": (1, 2), "windows": (16, 32)}.get(form, (1, 2, 17)):
            got = library.run_planned(tmp_path, plan, images[:batch], expected.shape[1], INT8)
            assert float((got.double() - expected[:batch]).abs().max()) < 1e-5 * scale, (form, batch)
            again = library.run_planned(tmp_path, plan, images[:batch], expected.shape[1], INT8, 3)
            assert torch.equal(got, again), (form, batch)


@pytest.mark.slow  # a minute of compilation
@pytest.mark.parametrize("case", ["3x3 in passes", "3x3 strided wide", "3x3 added", "1x1 strided"])
def test_nothing_is_read_or_written_beside_what_is_there(case: str, tmp_path: Path) -> None:
    layer, size = CASES[case]
    channels = layer.conv.in_channels
    first = capture(layer, (channels, *size)).ops[0].output.name
    write(layer, (channels, *size), tmp_path, ranges={first: 3.7})
    done = self_test(tmp_path, tmp_path, SANITIZED, ASAN_OPTIONS="detect_leaks=0")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_weight_that_is_no_number_is_not_lost(tmp_path: Path) -> None:
    for kernel in (1, 3):
        layer = Layer(12, 8, kernel, 1, density=0.5)
        with torch.no_grad():
            layer.conv.weight[3][layer.conv.weight[3] != 0] = torch.nan
        folder = tmp_path / str(kernel)
        write(layer, (12, 6, 6), folder, ranges={capture(layer, (12, 6, 6)).ops[0].output.name: 2.0})
        library = Library(build(folder))
        if INT8 not in library.names():
            pytest.skip("this processor does not multiply int8 numbers")
        for batch in (1, 17):
            weights = (folder / "weights.bin").read_bytes()
            got = library.run(weights, torch.rand(batch, 12, 6, 6), 8 * 36, INT8).view(batch, 8, 36)
            assert bool(got[:, 3].isnan().all())
            assert bool(got[:, :3].isfinite().all())


@pytest.mark.parametrize("name", ["resnet8", "vgg11", "mobilenet_v1", "cifarnet", "mobilenet_v3_small"])
def test_the_interpreter_computes_what_the_network_does(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name, num_classes=7, width=0.25).eval().double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    program = capture(model, (3, 32, 32))
    values = dict(run(program, x))
    assert list(values) == program.values
    with torch.no_grad():
        torch.testing.assert_close(values[program.output].flatten(1), model(x))


class Odd(nn.Module):
    """What is pooled, padded, joined and cropped."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, dilation=1)
        self.pools = nn.ModuleList(
            [
                nn.MaxPool2d(3, 2, 1),
                nn.MaxPool2d(3, 2, ceil_mode=True),
                nn.AvgPool2d(3, 2, 1),
                nn.AvgPool2d(3, 2, 1, count_include_pad=False),
                nn.AvgPool2d(3, 2, ceil_mode=True),
                nn.AvgPool2d(2, divisor_override=3),
                nn.AdaptiveAvgPool2d((3, 2)),
                nn.AdaptiveMaxPool2d((2, 3)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.conv(x))
        parts = [pool(x).flatten(1) for pool in self.pools]
        parts += [F.leaky_relu(x, 0.1)[:, 2:5, 1:, :-2].flatten(1), F.relu6(3 * x).flatten(1)]
        return torch.cat([*parts, F.pad(x, (1, 0, 2, 1)).flatten(1)], 1).softmax(1)


def test_the_interpreter_knows_every_operation() -> None:
    torch.manual_seed(0)
    model = Odd().eval().double()
    x = torch.randn(2, 3, 11, 8, dtype=torch.float64)
    program = capture(model, (3, 11, 8))
    values = dict(run(program, x))
    with torch.no_grad():
        torch.testing.assert_close(values[program.output].flatten(1), model(x))


WAYS: dict[str, tuple[bool, Callable[[Tensor, Tensor], Tensor]]] = {
    "positive": (True, lambda a, b: a),
    "any": (False, lambda a, b: b),
    "gelu": (False, lambda a, b: F.gelu(b)),
    "relu6": (True, lambda a, b: F.relu6(b)),
    "clamp": (False, lambda a, b: b.clamp(-1, 2)),
    "sigmoid": (True, lambda a, b: torch.sigmoid(b)),
    "tanh": (False, lambda a, b: torch.tanh(a)),
    "pool": (True, lambda a, b: F.max_pool2d(a, 3, 1, 1)),
    "pool of any": (False, lambda a, b: F.avg_pool2d(b, 3, 1, 1)),
    "sum": (True, lambda a, b: a + torch.sigmoid(b)),
    "sum with any": (False, lambda a, b: a + b),
    "difference": (False, lambda a, b: a - torch.sigmoid(b)),
    "product": (True, lambda a, b: a * torch.sigmoid(b)),
    "product with any": (False, lambda a, b: a * b),
    "joined": (True, lambda a, b: torch.cat([a[:, :2], torch.relu(b[:, :2])], 1)),
    "joined with any": (False, lambda a, b: torch.cat([a[:, :2], b[:, :2]], 1)),
    "pool of joined": (False, lambda a, b: F.max_pool2d(torch.cat([a[:, :2], b[:, :2]], 1), 3, 1, 1)),
    "part of joined": (False, lambda a, b: torch.cat([a, b], 1)[:, 2:6]),
    "sum with joined": (False, lambda a, b: a + torch.cat([a[:, :2], b[:, :2]], 1)),
    "padded": (True, lambda a, b: F.pad(a, (1, 1, 1, 1))),
}


@pytest.mark.parametrize("way", WAYS)
def test_only_what_is_never_negative_can_be_int8(way: str) -> None:
    can_be, function = WAYS[way]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.convs[2](function(torch.relu(self.convs[0](x)), self.convs[1](x)))
            return y

    program = capture(Net().eval(), (4, 6, 6))
    assert (program.ops[-1].input in int8_inputs(program)) == can_be


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 5), nn.Conv2d(4, 4, 3, 3), nn.Conv2d(4, 4, 3, groups=2),
     nn.Conv2d(4, 4, 1, padding=1), nn.Conv2d(4, 4, (3, 1))],
)  # fmt: skip
def test_only_convolutions_that_there_is_code_for_can_be_int8(conv: nn.Module) -> None:
    assert int8_inputs(capture(nn.Sequential(nn.ReLU(), conv).eval(), (4, 9, 9))) == []


def test_ranges_have_the_least_error_of_their_candidates() -> None:
    torch.manual_seed(0)
    model = Layer(4, 4, 3, 1, density=0.5).eval()
    program = capture(model, (4, 8, 8))
    x = torch.randn(64, 4, 8, 8)
    x[0, 0, 0, 0] = 60  # one number far out, which is worth clipping
    (found,) = calibrate(program, x.split(16)).values()
    positive = np.maximum(x.numpy().astype(np.float64), 0).ravel()

    def error(most: float) -> float:
        total = 0.0
        for number in positive:
            total += (min(round(number * 255 / most), 255) * most / 255 - number) ** 2
        return total

    errors = {share: error(60 * share) for share in (1.0, 0.75, 0.5, 0.3)}
    assert found == pytest.approx(60 * min(errors, key=lambda share: errors[share]))
    assert calibrate(program, x.clamp(max=1).split(16)) == pytest.approx(
        {next(iter(int8_inputs(program))): 1.0}
    )
    with pytest.raises(UserError, match="no images"):
        calibrate(program, [])
    x[0] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        calibrate(program, [x])


class Net(nn.Module):
    """Two sparse layers between dense ones."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), act, Layer(16, 24, 3, 1, density=0.3).conv, act,
            Layer(24, 16, 1, 1, density=0.4).conv, act, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(16, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def test_a_network_is_exported_with_int8_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Net(nn.ReLU()), torch.randn(40, 3, 12, 12)
    done = export_c(Finished(model), tmp_path / "c", [(x, torch.arange(40) % 5)], calibration=[x])
    assert done.int8_layers == 2
    text = str(done)
    if done.int8 is None:
        assert "2 layers can be int8" in text
        assert "not run" in text
    else:
        assert f"2 layers can be int8, {done.int8_used[0]} are for one image" in text
        assert 1 <= max(done.int8_used) <= 2
        assert 0 < done.int8.max_difference < 0.1 * float(model(x).detach().abs().max())
        assert (done.int8.images, done.int8.accuracy is None) == (40, False)
    tested = self_test(tmp_path / "c", tmp_path)
    assert tested.returncode == 0, tested.stdout
    assert (INT8 in tested.stdout) == (done.int8 is not None)


def test_what_cannot_be_int8_is_refused(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 12, 12)
    with pytest.raises(UserError, match="nothing of this network can be int8"):
        export_c(Finished(Net(nn.GELU())), tmp_path / "c", [(x, None)], calibration=[x])
    with pytest.raises(UserError, match="calibration images are of shape"):
        export_c(Finished(Net(nn.ReLU())), tmp_path / "c", [(x, None)], calibration=[x[:, :, 1:]])
    for wrong, why in ((5, "calibration is 5: give batches"), (["a"], "calibration gives batches of 'str'")):
        with pytest.raises(UserError, match=why):
            clicktrain.export(Net(nn.ReLU()), x, tmp_path / "c", calibration=wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="images is True: give batches"):
        clicktrain.export(Net(nn.ReLU()), x, tmp_path / "c", images=True)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="belong to format c"):
        clicktrain.export(Net(nn.ReLU()), x, tmp_path / "x.pt2", calibration=[x])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_loop_of_ones_own_exports_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 12, 12)
    loader = [(x, torch.zeros(6, dtype=torch.long))]
    done = clicktrain.export(Net(nn.ReLU()), x, tmp_path / "c", images=loader, calibration=loader)
    again = clicktrain.export(Net(nn.ReLU()), x, tmp_path / "again", calibration=x)
    assert "2 layers" in str(again)
    assert "2 layers" in str(done)
