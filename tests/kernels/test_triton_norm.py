"""Triton's passes of a batch norm, interpreted, against PyTorch's own in float64, in poisoned memory."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.kernels.innermost_layout import batch_norm_innermost, norm_kernels, norm_launch
from clicktrain.kernels.sparse_conv2d.batch_innermost.compiled import compile_function

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton")

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(norm_launch, "BLOCK", 16)
    monkeypatch.setattr(norm_launch, "BLOCKS", 2)


def innermost(images: Tensor) -> Tensor:
    return images.permute(1, 2, 3, 0).contiguous()


def near(mine: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    assert mine.shape == expected.shape, name
    largest = expected.detach().abs().max() + 1e-3  # of two numbers, gradients cancel
    error = float((mine.detach().double() - expected.detach()).abs().max() / largest)
    assert error <= tolerance, (name, error)


def check(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    relu: bool = True,
    added: bool = True,
    given: bool = False,
    affine: bool = True,
    far: float = 0.0,
) -> None:
    """Result, running statistics and all gradients, of values as the dtype has them."""
    torch.manual_seed(0)
    n, c = shape[:2]
    norm = nn.BatchNorm2d(c, affine=affine, momentum=0.3, dtype=torch.float64)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    # The smallest results of 16 bits are on one side of zero or the other: that decides gradients.
    x = (torch.randn(shape, dtype=torch.float64) + far).to(dtype)
    residual = torch.randn(shape, dtype=torch.float64).to(dtype)
    grad = torch.randn(shape, dtype=torch.float64).to(dtype)
    mine = copy.deepcopy(norm).to(torch.float64 if dtype is torch.float64 else torch.float32)
    inputs = [one.double().requires_grad_() for one in (x, residual)]
    before = norm(inputs[0]) + (inputs[1] if added else 0)
    with torch.no_grad():
        grad[(before.abs() < 1e-2) & relu] = 0
    expected = before.relu() if relu else before
    wanted = [*inputs[: 1 + added], *norm.parameters()]
    gradients = torch.autograd.grad(expected, wanted, grad.double())
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    statistics = tuple(one.to(mine.running_mean.dtype) for one in (mean, variance)) if given else None  # type: ignore[union-attr]
    own = [innermost(one).requires_grad_() for one in (x, residual)]
    y = batch_norm_innermost(
        own[0],
        mine,
        n,
        own[1] if added else None,
        "relu" if relu else "none",
        statistics,  # type: ignore[arg-type]
    )
    assert y.dtype is dtype
    assert type(y.grad_fn).__name__ == "FusedNormBackward"
    tolerance = TOLERANCE[dtype] * (1 + far)
    near(y.permute(3, 0, 1, 2), expected, tolerance, "y")
    for name, buffer in norm.named_buffers():
        near(mine.get_buffer(name), buffer.double(), tolerance, name)
    got = torch.autograd.grad(y, [*own[: 1 + added], *mine.parameters()], innermost(grad))
    names = ("gx", "gr", "gw", "gb") if added else ("gx", "gw", "gb")
    for name, one, other in zip(names, got, gradients, strict=False):
        near(one.permute(3, 0, 1, 2) if one.dim() == 4 else one, other, tolerance, name)


@pytest.mark.parametrize(
    "shape", [(3, 2, 4, 5), (17, 3, 3, 2), (1, 2, 5, 5), (2, 1, 1, 1), (16, 2, 2, 2)], ids=str
)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    check(shape, torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("added", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_what_it_fuses(dtype: torch.dtype, added: bool, relu: bool) -> None:
    check((5, 2, 3, 4), dtype, added=added, relu=relu, given=added)


def test_without_weights_and_far_from_zero() -> None:
    check((5, 2, 3, 4), torch.float64, affine=False)
    check((5, 2, 3, 4), torch.float32, far=1000.0)


def test_a_nan_is_seen_and_other_channels_are_not_touched() -> None:
    norm, x = nn.BatchNorm2d(3), torch.randn(4, 3, 3, 3)
    x[1, 2, 0, 0] = float("nan")
    y = batch_norm_innermost(innermost(x), norm, 4, None, "relu")
    assert bool(y[2].isnan().all())
    assert not bool(y[:2].isnan().any())


def test_known_statistics_without_gradients_are_one_pass() -> None:
    norm, x = nn.BatchNorm2d(3).eval(), torch.randn(4, 3, 3, 3)
    norm.running_mean.normal_()  # type: ignore[union-attr]
    with torch.no_grad():
        y = batch_norm_innermost(innermost(x), norm, 4, None, "relu")
        torch.testing.assert_close(y.permute(3, 0, 1, 2), norm(x).relu())
    # With gradients PyTorch's own runs: its statistics are constants there.
    assert "FusedNorm" not in str(batch_norm_innermost(innermost(x), norm, 4).grad_fn)


def test_other_activations_and_single_numbers_are_pytorchs() -> None:
    norm, x = nn.BatchNorm2d(3), torch.randn(4, 3, 3, 3)
    y = batch_norm_innermost(innermost(x), copy.deepcopy(norm), 4, None, "silu")
    torch.testing.assert_close(y.permute(3, 0, 1, 2), F.silu(norm(x)))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm_innermost(torch.randn(3, 1, 1, 1), norm, 1)


@pytest.mark.parametrize(
    ("kernel", "flags"),
    [
        (norm_kernels.channel_statistics, {}),
        (norm_kernels.normalize, {"RESIDUAL": True, "RELU": True}),
        (norm_kernels.gradient_sums, {"RELU": True}),
        (norm_kernels.input_gradient, {"RELU": True, "BY_RESULT": True, "RESIDUAL": True}),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_compiled_for_hopper_they_read_16_bytes_at_a_time(kernel: object, flags: dict[str, bool]) -> None:
    cut = {"BLOCK": 2048, "BLOCKS": 4, **flags}
    compiled = compile_function(kernel, torch.bfloat16, cut, 90)  # type: ignore[arg-type]
    assert compiled.spilled == 0
    assert compiled.instructions["vector loads"] > 0
    assert compiled.programs >= 8, compiled
