"""Max pooling, batch norm and activation in one pass, against PyTorch in float64 and the passes apart."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from slow_layout import block, unblock
from test_batch_norm2d import EPS, FUNCTIONS, LANES, blocked, close, rest
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.kernels.batch_norm2d import batch_norm_blocked, launch, max_pool2d_batch_norm2d_blocked
from clicktrain.kernels.max_pool2d import Pooling, max_pool_blocked
from clicktrain.kernels.native import STORED_TYPES, compute_type, toolchain

OPERATORS = torch.ops.clicktrain
pytestmark = pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")
NAN = float("nan")
POOLINGS = [Pooling(2), Pooling(2, ceil_mode=True), Pooling(3, 2, 1), Pooling((3, 2), (2, 3)), Pooling(3, 3)]
OVERLAPPING = POOLINGS[2:4]
SHAPES = [(1, 3, 7, 5), (5, 1, 4, 4), (33, 4, 5, 6), (16, 2, 9, 3), (19, 2, 36, 34)]


def torch_pool(x: Tensor, pooling: Pooling) -> Tensor:
    kernel, stride, padding, dilation = (pooling.window()[i : i + 2] for i in range(0, 8, 2))
    return F.max_pool2d(x, kernel, stride, padding, dilation, pooling.ceil_mode)


def different(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of which no two are equal in a window: a maximum among equals has no derivative."""
    count = shape[2] * shape[3]
    planes = torch.stack([torch.randperm(count) for _ in range(shape[0] * shape[1])]).view(shape)
    return ((planes - count / 2) / 32).to(dtype) if count < 256 else torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", STORED_TYPES, ids=str)
@pytest.mark.parametrize("pooling", POOLINGS, ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_training(pooling: Pooling, activation: str, dtype: torch.dtype) -> None:
    for shape in SHAPES[:4] if dtype is torch.bfloat16 else SHAPES:
        torch.manual_seed(0)
        residual = shape[0] % 2 == 1
        x, computed, loose = (
            different(shape, dtype),
            compute_type(dtype),
            dtype if activation == "gelu" else None,
        )
        weight, bias = torch.rand(shape[1]).to(computed) + 0.5, torch.randn(shape[1]).to(computed)
        size = torch_pool(x.float(), pooling).shape
        # Of a few numbers nothing is left but what h was rounded by.
        if size[0] * size[2] * size[3] < (8 if dtype is torch.bfloat16 else 2):
            continue
        other, gy = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
        given = [t.double().requires_grad_() for t in (x, weight, bias, other)]
        pooled = torch_pool(given[0], pooling)
        want = F.batch_norm(pooled, None, None, given[1], given[2], True, 0.1, EPS)
        want = FUNCTIONS[activation](want + given[3] if residual else want)
        given = given if residual else given[:3]
        expected = torch.autograd.grad(want, given, gy.double())
        inputs = [blocked(x, NAN), weight.clone(), bias.clone(), blocked(other, NAN) if residual else None]
        wanted = [t.requires_grad_() for t in inputs if t is not None]
        arguments = pooling.window(), pooling.ceil_mode, shape[0], EPS, activation
        y, maxima, taps, mean, var = max_pool2d_batch_norm2d_blocked(*inputs, *arguments)
        assert not any(t.requires_grad for t in (maxima, taps, mean, var))
        assert y.dtype is dtype
        close(unblock(y, shape[0]), want, loose)
        assert torch.equal(unblock(maxima, shape[0]).double(), pooled.detach())
        close(mean, pooled.mean((0, 2, 3)))
        close(var, pooled.var((0, 2, 3), correction=0))
        gradients = torch.autograd.grad(y, wanted, blocked(gy, 0.0))
        for own, exact in zip(gradients, expected, strict=True):
            if own.dim() != 5:
                close(own, exact, loose)
                continue
            assert not rest(own, shape[0]).any()
            if pooling in OVERLAPPING and dtype is torch.bfloat16:  # each part of a sum is rounded by itself
                own, exact = unblock(own, shape[0]).double(), exact.detach()
                torch.testing.assert_close(own, exact, rtol=0, atol=2.0**-7 * float(exact.abs().max()))
            else:
                close(unblock(own, shape[0]), exact, loose)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["training", "evaluation", "evaluation with gradients"])
def test_as_the_passes_apart(mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(3).train(mode == "training")
    nn.init.uniform_(layer.weight)
    other, pooling, n = copy.deepcopy(layer), Pooling(2), 21
    x = block(torch.randn(n, 3, 7, 8).to(dtype), LANES[dtype])
    for _ in range(2):
        with torch.set_grad_enabled(mode != "evaluation"):
            one, two = (x.clone().requires_grad_(mode != "evaluation") for _ in range(2))
            y = batch_norm_blocked(one, layer, n, None, "gelu", None, pooling)
            want = batch_norm_blocked(max_pool_blocked(two, pooling), other, n, None, "gelu")
        assert torch.equal(unblock(y, n), unblock(want, n))
        if mode != "evaluation":
            gy = block(torch.randn(n, 3, 3, 4).to(dtype), LANES[dtype])
            for own, apart in zip(
                torch.autograd.grad(y, [one, *layer.parameters()], gy),
                torch.autograd.grad(want, [two, *other.parameters()], gy),
                strict=True,
            ):
                assert torch.equal(own, apart)
    torch.testing.assert_close(layer.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("pooling", [Pooling(2), Pooling(3, 1, 1)], ids=["two", "any"])
def test_every_element_is_written_and_threads_agree(pooling: Pooling) -> None:
    n, window, ceil = 19, pooling.window(), pooling.ceil_mode
    x = blocked(torch.randn(n, 5, 7, 6), 1.0)
    weight, bias = torch.rand(5), torch.randn(5)
    shape = launch.pooled_shape(x, window, ceil)
    gy, residual = blocked(torch.randn(n, 5, *shape[2:4]), 1.0), blocked(torch.randn(n, 5, *shape[2:4]), 1.0)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            y, maxima, evaluated = (torch.full(shape, NAN) for _ in range(3))
            mean, var = torch.full((5,), NAN), torch.full((5,), NAN)
            taps = torch.full_like(
                launch.pooled_forward(x, None, None, None, window, ceil, n, EPS, "gelu").taps, -1
            )
            out = launch.Pooled(y, maxima, taps, mean, var)
            launch.pooled_forward(x, weight, bias, residual, window, ceil, n, EPS, "gelu", out)
            parameters = mean, var, weight, bias
            launch.pooled_given(x, *parameters, residual, window, ceil, n, EPS, "gelu", evaluated)
            gradients = launch.Gradients(*(torch.full_like(t, NAN) for t in (x, weight, weight, y)))
            kept = maxima, taps, None, residual, weight, bias, mean, var
            launch.pooled_backward(gy, *kept, (7, 6), window, n, EPS, "gelu", True, gradients)
            results = [*out, evaluated, *gradients]
            assert all(t.isfinite().all() for t in results if t.is_floating_point())
            assert (taps >= 0).all()
            torch.testing.assert_close(evaluated, y)
            found.append(results)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_declared_as_computed_and_differentiated() -> None:
    x = block(different((5, 2, 5, 4), torch.float64), LANES[torch.float64]).requires_grad_()
    weight, bias = (torch.rand(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    arguments = x, weight, bias, None, Pooling(2).window(), False, 5, EPS, "gelu"
    torch.library.opcheck(OPERATORS.max_pool2d_batch_norm2d_blocked.default, arguments)
    y, maxima, taps, mean, var = (t.detach() for t in max_pool2d_batch_norm2d_blocked(*arguments))
    rest_of = (5, 4), Pooling(2).window(), 5, EPS
    for activation, beside in (("gelu", (None, y)), ("relu", (y, None)), ("none", (None, None))):
        torch.library.opcheck(
            OPERATORS.max_pool2d_batch_norm2d_blocked_backward.default,
            (y, maxima, taps, *beside, weight.detach(), bias.detach(), mean, var, *rest_of, activation, True),
            test_utils="test_faketensor",
        )
    torch.library.opcheck(
        OPERATORS.max_pool2d_batch_norm2d_blocked_given.default,
        (x.detach(), mean, var, None, None, None, *arguments[4:]),
        test_utils="test_faketensor",
    )
    images = different((5, 2, 5, 4), torch.float64).requires_grad_()

    def run(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        inside = block(images, LANES[torch.float64])
        return unblock(max_pool2d_batch_norm2d_blocked(inside, weight, bias, *arguments[3:])[0], 5)

    assert torch.autograd.gradcheck(run, (images, weight, bias))


def test_one_graph() -> None:
    layer, lanes = nn.BatchNorm2d(3), LANES[torch.float32]
    other = copy.deepcopy(layer)

    def step(x: Tensor) -> Tensor:
        return batch_norm_blocked(x, layer, 5, None, "gelu", None, Pooling(2)).square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    x = block(torch.randn(5, 3, 4, 4), lanes).requires_grad_()
    (gx,) = torch.autograd.grad(compiled(x), x)
    want = batch_norm_blocked(x, other, 5, None, "gelu", None, Pooling(2)).square().sum()
    assert torch.equal(gx, torch.autograd.grad(want, x)[0])
    assert torch.equal(layer.running_var, other.running_var)  # type: ignore[arg-type]


def test_a_diverged_training_stays_visible() -> None:
    x = torch.randn(5, 2, 4, 4)
    x[2, 1, 0, 0] = NAN
    y = batch_norm_blocked(blocked(x, 0.0), nn.BatchNorm2d(2), 5, None, "relu", None, Pooling(2))
    assert unblock(y, 5)[:, 1].isnan().all()
    assert not unblock(y, 5)[:, 0].isnan().any()


def test_refusals() -> None:
    x, layer = torch.zeros(1, 2, 4, 4, LANES[torch.float32]), nn.BatchNorm2d(2)
    for images, pooling, message in (
        (x.half(), Pooling(2), "float16"),
        (x[..., :-1], Pooling(2), "blocked batch norm takes"),
        (x, Pooling(9), "does not fit"),
        (x, Pooling(2, padding=2), "half the kernel"),
    ):
        with pytest.raises(UserError, match=message):
            batch_norm_blocked(images, layer, 3, None, "none", None, pooling)
    with pytest.raises(UserError, match="beside its input"):
        batch_norm_blocked(x, layer, 3, x, "none", None, Pooling(2))
    with pytest.raises(UserError, match="more than one number"):
        batch_norm_blocked(x[:, :, :2, :2], layer, 1, None, "none", None, Pooling(2))
    out = launch.pooled_forward(x, None, None, None, Pooling(2).window(), False, 3, EPS, "none")
    kept = out.maxima, out.taps[:, :1], None, None, None, None, out.mean, out.var
    with pytest.raises(UserError, match="taps are"):
        launch.pooled_backward(out.y, *kept, (4, 4), Pooling(2).window(), 3, EPS, "none", False)
