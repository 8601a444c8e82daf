"""Activation functions of the kernels against PyTorch in float64: bounds, gradients, NaN and infinities."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.kernels.activations import NAMES, Activation
from clicktrain.kernels.batch_norm2d import activation_blocked
from clicktrain.kernels.native import STORED_TYPES, toolchain

TOOLS = toolchain()
pytestmark = pytest.mark.skipif(TOOLS is None, reason="there is no C compiler")
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "clamp -0.5 1.5": lambda x: F.hardtanh(x, -0.5, 1.5),
    "leaky 0.125": lambda x: F.leaky_relu(x, 0.125),
    "hardswish": F.hardswish,
    "silu": F.silu,
    # Not F.gelu, whose tails lose their digits.
    "gelu": lambda x: x * torch.special.log_ndtr(x).exp(),
    "gelu_tanh": lambda x: x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
}
# Largest error of a result over its own size, except in the tail; in the tail; and of a slope, over 1.
# Rounding to bfloat16 is up to 2^-8 of it: with the rest, less than a unit in its last place.
RELATIVE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2.0**-8 + 1.3e-3}
TAIL = {torch.float64: 1e-13, torch.float32: 7e-9, torch.bfloat16: 2e-8}
SLOPE = {torch.float64: 1e-13, torch.float32: 2.5e-6, torch.bfloat16: 2.0**-8 + 2.0**-11}


def through(z: Tensor, activation: str, g: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Results and gradients of a flat tensor, by the kernel."""
    assert TOOLS is not None
    lanes = TOOLS.lanes(z.dtype)
    padded = F.pad(z, (0, -len(z) % lanes))
    x = padded.view(1, 1, 1, -1, lanes).clone().requires_grad_()
    gy = torch.ones_like(x) if g is None else F.pad(g, (0, -len(z) % lanes)).view(x.shape)
    y = activation_blocked(x, lanes, activation)
    (gx,) = torch.autograd.grad(y, x, gy)
    return y.detach().flatten()[: len(z)], gx.flatten()[: len(z)]


def test_all_are_tested_against_the_usual_functions() -> None:
    assert {text.split()[0] for text in FUNCTIONS} == set(NAMES)
    x = torch.linspace(-4, 4, 99, dtype=torch.float64)
    torch.testing.assert_close(FUNCTIONS["gelu"](x), F.gelu(x))
    torch.testing.assert_close(FUNCTIONS["gelu_tanh"](x), F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("dtype", STORED_TYPES, ids=str)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_results_and_slopes(activation: str, dtype: torch.dtype) -> None:
    z = torch.cat([torch.linspace(-12, 12, 24001), torch.randn(999) * 1e-3, torch.randn(99) * 1e4]).to(dtype)
    y, slope = through(z, activation)
    exact = z.double().requires_grad_()
    want = FUNCTIONS[activation](exact)
    (expected,) = torch.autograd.grad(want.sum(), exact)
    error = (y.double() - want).detach().abs()
    inside = (z.double() > -5.5) & (want != 0)
    assert (error / want.abs())[inside].max() <= RELATIVE[dtype]
    assert (error - RELATIVE[dtype] * want.abs()).max() <= TAIL[dtype]
    kinks = torch.zeros_like(z, dtype=torch.bool)
    for kink in {"clamp -0.5 1.5": (-0.5, 1.5), "hardswish": (-3, 3)}.get(activation, ()):
        kinks |= (z.double() - kink).abs() < 1e-6
    assert (slope.double() - expected).abs()[~kinks].max() <= SLOPE[dtype]


@pytest.mark.parametrize("dtype", STORED_TYPES, ids=str)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_what_diverged_stays_visible(activation: str, dtype: torch.dtype) -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 0.0, -0.0], dtype=dtype)
    y, slope = through(values, activation)
    want = FUNCTIONS[activation](values.double())
    assert y[0].isnan()
    assert y[1] == want[1]
    assert slope[0].isnan() or activation in ("relu", "clamp -0.5 1.5", "leaky 0.125", "none")
    bounded = want.isfinite() & (want.abs() < 1e30)
    torch.testing.assert_close(y[bounded].double(), want[bounded], rtol=0, atol=TAIL[dtype])
    # Where PyTorch gives NaN for the least number, so do we, or an infinity, or its limit.
    assert not y[2].isfinite() or abs(float(y[2])) < 1e-9 or y[2] == want[2]
    assert slope[5:].isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "clamp -0.5 1.5"])
def test_a_gradient_that_is_masked_out_may_be_anything(activation: str) -> None:
    nan = float("nan")
    z, g = torch.tensor([-2.0, 1.0, -2.0, 1.0]), torch.tensor([nan, nan, float("inf"), 1.0])
    _, gx = through(z, activation, g)
    assert gx.isnan().tolist() == [False, True, False, False]
    assert gx[[0, 2]].tolist() == [0, 0]


@pytest.mark.parametrize("activation", list(FUNCTIONS)[4:])
def test_numerical_gradients(activation: str) -> None:
    assert TOOLS is not None
    lanes = TOOLS.lanes(torch.float64)
    x = (torch.randn(1, 2, 1, 2, lanes, dtype=torch.float64) * 2).requires_grad_()
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: activation_blocked(x, lanes, activation, b), (x, bias))


def test_text() -> None:
    for text in FUNCTIONS:
        assert str(Activation.read(text)) == text
    assert Activation.read("clamp 0.0 6.0") == Activation("clamp", 0.0, 6.0)
    for text, reason in {
        "tanh": "an activation is one of",
        "leaky": "is no activation",
        "leaky -0.1": "is positive",
        "leaky x": "is no activation",
        "clamp 6.0 0.0": "from low to high",
        "relu 1.0": "is no activation",
    }.items():
        with pytest.raises(UserError, match=reason):
            Activation.read(text)
