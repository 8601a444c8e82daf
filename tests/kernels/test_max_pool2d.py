"""Blocked max pooling against PyTorch's: results, ties, NaN and gradients, on poisoned memory."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from slow_layout import block, unblock
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.kernels.max_pool2d import MOST_TAPS, Pooling, max_pool_blocked, ops
from clicktrain.kernels.max_pool2d.ops import max_pool2d_blocked
from clicktrain.kernels.native import STORED_TYPES, toolchain

TOOLS = toolchain()
OPERATORS = torch.ops.clicktrain
pytestmark = [
    pytest.mark.skipif(TOOLS is None, reason="there is no C compiler"),
    pytest.mark.usefixtures("poisoned_memory"),
]
LANES = {dtype: TOOLS.lanes(dtype) if TOOLS else 1 for dtype in STORED_TYPES}
NAN = float("nan")


def literal(x: Tensor, gy: Tensor | None, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """Position by position, in float64: results, and the gradient of x if there is one of the result."""
    kh, kw, sh, sw, ph, pw, dh, dw = pooling.window()
    h, w = x.shape[2:]
    y = F.max_pool2d(x.double(), (kh, kw), (sh, sw), (ph, pw), (dh, dw), pooling.ceil_mode)
    gx = torch.zeros(x.shape, dtype=torch.float64)
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            places = [
                (i * sh - ph + a * dh, j * sw - pw + b * dw)
                for a in range(kh)
                for b in range(kw)
                if 0 <= i * sh - ph + a * dh < h and 0 <= j * sw - pw + b * dw < w
            ]
            if not places:  # dilated over the whole image
                assert (y[:, :, i, j] == -float("inf")).all()
                continue
            window = torch.stack([x[:, :, r, s].double() for r, s in places], -1)
            assert torch.equal(window.max(-1).values, y[:, :, i, j])
            first = (window == window.max(-1, keepdim=True).values).double().argmax(-1)
            for k, (r, s) in enumerate(places):
                if gy is not None:
                    gx[:, :, r, s] += gy[:, :, i, j].double() * (first == k)
    return y, gx


def check(x: Tensor, pooling: Pooling) -> None:
    n = len(x)
    own = block(x, LANES[x.dtype]).requires_grad_()
    y = max_pool_blocked(own, pooling)
    gy = torch.randn(unblock(y, n).shape).to(x.dtype)
    want, gradient = literal(x, gy, pooling)
    assert y.dtype is x.dtype
    assert torch.equal(unblock(y, n).double(), want)
    (gx,) = torch.autograd.grad(y, own, block(gy, LANES[x.dtype]))
    rounding = {torch.bfloat16: 2.0**-8, torch.float32: 1e-6, torch.float64: 1e-14}[x.dtype]
    torch.testing.assert_close(unblock(gx, n).double(), gradient, rtol=rounding, atol=rounding)
    filling = unblock(gx, gx.shape[0] * gx.shape[4])[n:]
    assert not filling.any()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Pooling]:
    kernel = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    padding = draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (1, 3)]))
    stride = draw(st.sampled_from([None, (1, 1), (2, 2), (3, 1), (2, 5)]))
    reach = [(k - 1) * d + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    image = [draw(st.integers(max(least, 1), 12)) for least in reach]
    n, c = draw(st.sampled_from([1, 3, 16, 17])), draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(STORED_TYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    x = torch.randint(-9, 9, (n, c, *image), generator=generator).to(dtype)  # with ties
    return x, Pooling(kernel, stride, padding, dilation, draw(st.booleans()))


@settings(max_examples=150)
@given(cases())
def test_equals_the_literal_one(case: tuple[Tensor, Pooling]) -> None:
    check(*case)


@pytest.mark.parametrize("dtype", STORED_TYPES, ids=str)
@pytest.mark.parametrize("image", [(8, 8), (9, 7), (1, 2), (2, 1), (3, 301)], ids=str)
@pytest.mark.parametrize(
    "pooling",
    [Pooling(2, ceil_mode=True), Pooling(3, 2, 1), Pooling(3, 2, 1, ceil_mode=True), Pooling(3, 3, 1)],
    ids=["two", "three", "three-ceil", "apart-padded"],
)
def test_the_usual_windows(image: tuple[int, int], pooling: Pooling, dtype: torch.dtype) -> None:
    check(torch.randint(-50, 50, (11, 2, *image)).to(dtype), pooling)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_nothing(threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        check(torch.randn(19, 5, 9, 6), Pooling(3, 2, 1))
        check(torch.randn(19, 5, 9, 6), Pooling(2))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("pooling", [Pooling(2), Pooling(3, 1, 1)], ids=["two", "any"])
def test_nan_and_infinities_as_for_torch(pooling: Pooling) -> None:
    x = torch.randn(5, 2, 6, 6)
    x[0, 0, 0, 1] = x[0, 0, 1, 0] = x[3, 1, 5, 5] = NAN
    x[1] = -float("inf")
    x[2, 0, 2, 2] = float("inf")
    theirs = x.clone().requires_grad_()
    own = block(x, LANES[x.dtype]).requires_grad_()
    want = F.max_pool2d(theirs, *pooling.window()[:1], pooling.stride, pooling.padding)
    y = max_pool_blocked(own, pooling)
    assert torch.equal(unblock(y, 5).nan_to_num(nan=7e7), want.nan_to_num(nan=7e7))
    gy = torch.randn(want.shape)
    (gx,) = torch.autograd.grad(y, own, block(gy, LANES[x.dtype]))
    torch.testing.assert_close(unblock(gx, 5), torch.autograd.grad(want, theirs, gy)[0])


def test_a_gradient_that_diverged_stays_where_it_belongs() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    own = block(x, LANES[x.dtype]).requires_grad_()
    gy = torch.ones(1, 1, 2, 2)
    gy[0, 0, 0, 0] = NAN
    (gx,) = torch.autograd.grad(max_pool_blocked(own, Pooling(2)), own, block(gy, LANES[x.dtype]))
    assert unblock(gx, 1).isnan().nonzero().tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_declared_as_computed(dtype: torch.dtype) -> None:
    x = block(torch.randn(5, 3, 7, 6, dtype=dtype), LANES[dtype]).requires_grad_()
    window = Pooling(3, 2, 1).window()
    torch.library.opcheck(OPERATORS.max_pool2d_blocked.default, (x, window, False))
    y, taps = max_pool2d_blocked(x.detach(), window, False)
    arguments = torch.randn(y.shape, dtype=dtype), taps, [7, 6], window
    torch.library.opcheck(OPERATORS.max_pool2d_blocked_backward.default, arguments)


@pytest.mark.parametrize("n", [1, 5, 16])
def test_numerical_gradients(n: int) -> None:
    # Of images, not of blocks: padding lanes are all zero, and a maximum among equals has no derivative.
    lanes = LANES[torch.float64]
    images = torch.randperm(n * 2 * 5 * 4).view(n, 2, 5, 4).double().requires_grad_()

    def pooled(images: Tensor) -> Tensor:
        return unblock(max_pool_blocked(block(images, lanes), Pooling(3, 2, 1)), n)

    assert torch.autograd.gradcheck(pooled, images, fast_mode=n > 5)


def test_one_graph() -> None:
    def step(x: Tensor) -> Tensor:
        return max_pool_blocked(x, Pooling(2)).sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    x = block(torch.randn(5, 2, 4, 4), LANES[torch.float32]).requires_grad_()
    (gx,) = torch.autograd.grad(compiled(x), x)
    assert torch.equal(gx, torch.autograd.grad(step(x), x)[0])


def test_refusals() -> None:
    x = torch.zeros(1, 2, 4, 4, LANES[torch.float32])
    cases: list[tuple[Any, Pooling, str]] = [
        (x.half(), Pooling(2), "float16"),
        (x[..., :-1], Pooling(2), "blocked pooling takes"),
        (x, Pooling(9), "does not fit"),
        (x, Pooling(2, padding=2), "half the kernel"),
        (x, Pooling(2, 0), "a window is"),
        (x, Pooling((MOST_TAPS, 2)), "at most"),
    ]
    for images, pooling, message in cases:
        with pytest.raises(UserError, match=message):
            max_pool_blocked(images, pooling)
    y, taps = ops.forward(x, Pooling(2).window(), False)
    with pytest.raises(UserError, match="taps are"):
        ops.backward(y, taps[:, :1], (4, 4), Pooling(2).window())
    assert Pooling(11).fits()
    assert not Pooling(12).fits()
