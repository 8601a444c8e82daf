"""Plans of exported networks: all ways to run a convolution, measured ones, threads of a call."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from c_builds import CHOICES, Library, alive, build, check, check_choices, needs_compiler, plan_file, write
from torch import nn

from clicktrain.bench.masks import pattern_mask
from clicktrain.inference.capture import capture

torch.set_num_threads(1)
pytestmark = [
    needs_compiler,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]
CANNOT_READ, NOT_A_PLAN = 3, 11


def patterned(filters: int, channels: int, density: float, seed: int = 0) -> nn.Conv2d:
    """A convolution with patterns of four, and some kernels of other sizes."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Conv2d(channels, filters, 3, padding=1)
    mask = pattern_mask((filters, channels, 3, 3), 1 / density, 1, generator)
    mask[:: max(filters // 5, 1)] = torch.rand(mask[:: max(filters // 5, 1)].shape, generator=generator) < 0.5
    with torch.no_grad():
        layer.weight.mul_(mask)
    return layer


class Small(nn.Module):
    """Convolutions of small images, alone and with what is added."""

    def __init__(self, filters: int = 40) -> None:
        super().__init__()
        self.first = patterned(filters, 3, 0.4)
        self.second = patterned(filters, filters, 0.15, 1)
        self.third = patterned(filters, filters, 0.3, 2)
        self.point = nn.Conv2d(filters, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.third(nn.functional.silu(self.second(x))) + x)
        y: torch.Tensor = self.point(x)
        return y


@pytest.mark.long
@pytest.mark.parametrize("size", [(4, 4), (8, 8), (7, 7), (3, 5), (1, 13), (9, 2)])
def test_every_choice_is_right_on_small_images(size: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    check_choices(Small().eval(), (3, *size), tmp_path)


def with_patterns(filters: int, channels: int, density: float, seed: int = 0) -> nn.Conv2d:
    """A convolution with patterns of four, a kernel that has all weights, and one of five."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Conv2d(channels, filters, 3, padding=1)
    mask = pattern_mask((filters, channels, 3, 3), 1 / density, 1, generator)
    mask[0, -1] = True
    mask[-1, 0].flatten()[2:7] = True
    with torch.no_grad():
        layer.weight.mul_(mask)
    return layer


class Windows(nn.Module):
    """Convolutions of which blocks of images run by windows: strides, activations, sums, many channels."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 1)
        self.second = with_patterns(9, channels, 0.2, 1)
        self.third = with_patterns(9, 9, 0.3, 2)
        self.fourth = with_patterns(7, 9, 0.4, 3)
        self.fourth.stride, self.fourth.padding = (2, 2), (padding, padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.hardswish(self.second(torch.relu(self.first(x))))
        y: torch.Tensor = self.fourth(nn.functional.silu(self.third(x) + x))
        return y


@pytest.mark.long
@pytest.mark.parametrize(
    ("channels", "size", "padding"), [(600, (4, 6), 1), (5, (8, 8), 1), (5, (11, 9), 0), (5, (9, 11), 2)]
)
def test_windows_are_right(channels: int, size: tuple[int, int], padding: int, tmp_path: Path) -> None:
    """Images that are one tile and that tiles overlap in, more channels than a pass has."""
    torch.manual_seed(0)
    model = Windows(channels, padding).eval()
    check_choices(model, (3, *size), tmp_path, (17,), ("windows",))


class Columns(nn.Module):
    """Convolutions of wide images, of stride 1 and 2, with sums of both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = with_patterns(11, 5, 0.5)
        self.second = with_patterns(11, 11, 0.3, 1)
        self.third = with_patterns(14, 11, 0.3, 2)
        self.beside = with_patterns(14, 11, 0.4, 3)
        self.fourth = with_patterns(6, 14, 0.4, 4)
        for layer in (self.third, self.beside, self.fourth):
            layer.stride = (2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = nn.functional.hardswish(self.second(x) + x)
        y: torch.Tensor = self.fourth(torch.relu(self.third(x) + nn.functional.silu(self.beside(x))))
        return y


@pytest.mark.long
@pytest.mark.parametrize(
    "size", [(32, 32), (15, 13), (29, 47), (5, 61), (18, 128), (5, 128), (42, 28), (24, 40)]
)
def test_columns_are_right(size: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    check_choices(Columns().eval(), (5, *size), tmp_path, (1, 2), ("columns",))


class Points(nn.Module):
    """1x1 convolutions: strides, activations, sums, channels of which some filters use none, one, or many."""

    def __init__(self, channels: int, stride: int | tuple[int, int]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 1)
        self.second = nn.Conv2d(channels, 21, 1, stride=stride)
        self.beside = nn.Conv2d(channels, 21, 1, stride=stride)
        self.third = nn.Conv2d(21, 5, 1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in (self.second, self.beside):
                layer.weight *= torch.rand(layer.weight.shape, generator=generator) < 0.3
                layer.weight[3] = 0
                layer.weight[4, 1:] = 0
            self.third.weight[:, ::2] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        y: torch.Tensor = self.third(torch.relu(self.second(x) + nn.functional.silu(self.beside(x))))
        return y


@pytest.mark.long
@pytest.mark.parametrize(
    ("channels", "size", "stride"),
    [(2, (4, 4), 1), (900, (7, 7), 1), (33, (14, 14), 1), (33, (1, 13), 1), (900, (28, 28), 2),
     (33, (13, 9), 2), (2, (2, 33), 2), (33, (11, 10), 3), (33, (31, 33), 2), (60, (47, 43), 2),
     (300, (8, 8), (2, 1)), (5, (8, 20), (1, 2)), (5, (12, 12), (3, 1))],
)  # fmt: skip
def test_1x1_convolutions_are_right(
    channels: int, size: tuple[int, int], stride: int | tuple[int, int], tmp_path: Path
) -> None:
    """One tile and several, which overlap or are shared by threads; passes, also of blocks."""
    torch.manual_seed(0)
    model = Points(channels, stride).eval()
    check_choices(model, (3, *size), tmp_path, (1, 2, 17), ("pointwise, L1", "pointwise, L2"))


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(2), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.MaxPool2d((2, 3), (1, 2), (1, 0), dilation=(1, 3)), nn.MaxPool2d(3, 3, 1), nn.MaxPool2d(5, 2, 2),
    ],
    ids=str,
)  # fmt: skip
def test_pooling_of_wide_rows_is_right(pool: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(nn.Sequential(nn.Conv2d(3, 5, 1), pool).eval(), (3, 7, 53), tmp_path, (1, 3))


class Cropped(nn.Module):
    """Few columns of a wide image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x[..., 700:])
        return y


def test_a_wide_image_is_cropped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(Cropped().eval(), (3, 2, 800), tmp_path, (1, 2))


def test_a_strided_linear_layer_is_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 32, 1, stride=2))
    check(alive(model, 0.3), (3, 6, 6), tmp_path, (1, 3, 17))


def test_nan_stays_in_pairs_of_small_images(tmp_path: Path) -> None:
    """An image of one vector: all bits of NaN are set after SiLU, and rounding is not to carry over them."""
    torch.manual_seed(0)
    model = nn.Sequential(patterned(8, 3, 0.5), nn.SiLU(), patterned(6, 8, 0.5, 1)).eval()
    shape = (3, 4, 4)
    write(model, shape, tmp_path)
    library, program = Library(build(tmp_path)), capture(model, shape)
    images = torch.full((1, *shape), float("nan"))
    for isa in library.names():
        plan = plan_file(tmp_path, program, isa, CHOICES["taps"])
        assert library.run_planned(tmp_path, plan, images, 6 * 16, isa).isnan().any(), isa


def test_every_choice_is_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(4, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, (3, 2), padding=(2, 1), dilation=(2, 1)),
        nn.ReLU(), nn.Conv2d(24, 30, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(30, 30, (1, 5), padding=(0, 2)), nn.Conv2d(30, 30, 5, padding=2, groups=3),
    ]  # fmt: skip
    check_choices(alive(nn.Sequential(*layers), 0.25), (4, 11, 9), tmp_path, (1, 9))


@pytest.mark.parametrize("filters", [3, 33, 130])
def test_filters_are_shared_among_threads(filters: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(Small(filters).eval(), (3, 4, 4), tmp_path, (1, 2, 5))


def open_planned(library: Library, folder: Path, plan: Path, batch: int = 2, isa: str | None = None) -> int:
    network = ctypes.c_void_p()
    name = None if isa is None else isa.encode()
    code: int = library.c.model_open_planned(
        bytes(folder / "weights.bin"), bytes(plan), batch, name, ctypes.byref(network)
    )
    assert (code == 0) == bool(network)
    library.c.model_close(network)
    return code


def test_a_plan_is_measured_and_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, shape = Small(20).eval(), (3, 6, 6)
    write(model, shape, tmp_path)
    library, plan = Library(build(tmp_path)), tmp_path / "measured.plan"
    assert library.c.model_measure_file(bytes(tmp_path / "weights.bin"), bytes(plan), 20, None) == 0
    images = torch.randn(19, *shape)
    got = library.run_planned(tmp_path, plan, images, 6 * 36)
    with torch.no_grad():
        torch.testing.assert_close(got, model(images).flatten(1), rtol=1e-4, atol=1e-5)
    wrong = tmp_path / "wrong.plan"
    assert open_planned(library, tmp_path, wrong) == CANNOT_READ
    for bad in (b"", plan.read_bytes()[:-1], plan.read_bytes() + b"x", b"X" + plan.read_bytes()[1:]):
        wrong.write_bytes(bad)
        assert open_planned(library, tmp_path, wrong) == NOT_A_PLAN
    head = plan.read_bytes()[:40]
    for value in range(256):  # any choice is one, or the rules'
        wrong.write_bytes(head + bytes([value]) * (len(plan.read_bytes()) - 40))
        assert open_planned(library, tmp_path, wrong) == 0
    other = plan_file(tmp_path, capture(model, shape), "abacus", 0)
    assert open_planned(library, tmp_path, other) == NOT_A_PLAN


def test_a_context_with_threads_that_cannot_be(tmp_path: Path) -> None:
    write(Small(3).eval(), (3, 4, 4), tmp_path)
    library = Library(build(tmp_path))
    _, network, _held = library.open((tmp_path / "weights.bin").read_bytes(), 1)
    context = ctypes.c_void_p()
    for threads in (0, -1, 65):
        assert library.c.model_context_new_threads(network, threads, ctypes.byref(context)) == 1
        assert not context
    library.c.model_close(network)


def test_python_measures_a_plan_and_takes_threads(tmp_path: Path) -> None:
    write(Small(9).eval(), (3, 4, 4), tmp_path)
    build(tmp_path)
    program = (
        "import numpy as np; from model import Network; x = np.ones((3, 3, 4, 4), np.float32);"
        "a = Network(3)(x); b = Network(3, threads=2, plan='here.plan')(x);"
        "c = Network(3, plan='here.plan')(x); assert np.abs(a - b).max() < 1e-4; assert (b == c).all()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert (tmp_path / "here.plan").stat().st_size > 40
