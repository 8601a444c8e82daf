"""Blocked batch norm, residual and activation against PyTorch in float64: results, statistics, gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from slow_layout import unblock
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.kernels.batch_norm2d import (
    affine_blocked,
    batch_norm2d_blocked,
    batch_norm_blocked,
    launch,
    ops,
)
from clicktrain.kernels.blocked_layout import block_batch, unblock_batch
from clicktrain.kernels.native import STORED_TYPES, compute_type, toolchain

TOOLS = toolchain()
OPERATORS = torch.ops.clicktrain
pytestmark = pytest.mark.skipif(TOOLS is None, reason="there is no C compiler")
LANES = {dtype: TOOLS.lanes(dtype) if TOOLS else 1 for dtype in STORED_TYPES}
EPS = 1e-5
NAN = float("nan")
# Images, channels, height, width; the last two need more than one piece of a sum.
SHAPES = [
    (1, 3, 5, 7),
    (5, 1, 3, 3),
    (16, 16, 4, 4),
    (20, 3, 1, 1),
    (33, 16, 3, 5),
    (3, 1, 33, 37),
    (35, 2, 35, 31),
]
CASES = [(residual, activation) for residual in (False, True) for activation in ("none", "relu", "gelu")]
FUNCTIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}
# Of the largest entry or of 1, whichever is more: everything in the cases is of about that size.
RELATIVE = {torch.float32: 4e-6, torch.float64: 1e-13}
# What is kept in bfloat16 is rounded once more, by half a unit in the last of its 8 places.
ROUNDING = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2.0**-8}


def blocked(x: Tensor, filling: float) -> Tensor:
    """[N, C, H, W] -> [B, C, H, W, V] with something in the filling lanes."""
    lanes = LANES[x.dtype]
    out = x.new_full((-(-len(x) // lanes) * lanes, *x.shape[1:]), filling)
    out[: len(x)] = x
    return out.view(-1, lanes, *x.shape[1:]).permute(0, 2, 3, 4, 1).contiguous()


def rest(x: Tensor, n: int) -> Tensor:
    """What the filling lanes hold."""
    return unblock(x, x.shape[0] * x.shape[4])[n:]


def close(ours: Tensor, expected: Tensor, loose: torch.dtype | None = None) -> None:
    """``loose`` is the dtype of what went through a GELU: good to a unit or so in each term of a sum."""
    expected = expected.detach()
    scale = max(float(expected.abs().max()), 1.0)
    rtol, atol = ROUNDING[ours.dtype], RELATIVE[compute_type(ours.dtype)] * scale
    if loose:
        rtol, atol = (2.0**-7, 2.0**-8 * scale) if loose == torch.bfloat16 else (rtol, 5 * atol)
    torch.testing.assert_close(ours.double(), expected, rtol=rtol, atol=atol)


class Case:
    """Numbers of one shape, blocked, and what PyTorch makes of them in float64."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, residual: bool, activation: str) -> None:
        torch.manual_seed(0)
        self.n, self.activation = shape[0], activation
        self.x = torch.randn(shape).to(dtype) + 1
        computed = compute_type(dtype)
        self.weight, self.bias = torch.rand(shape[1]).to(computed) + 0.5, torch.randn(shape[1]).to(computed)
        self.residual = torch.randn(shape).to(dtype) if residual else None
        self.gy = torch.randn(shape).to(dtype)
        self.loose = dtype if activation == "gelu" else None
        self.mean, self.var = self.x.double().mean((0, 2, 3)), self.x.double().var((0, 2, 3), correction=0)

    def expected(self, mean: Tensor | None = None, var: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Result and gradients of x, weight, bias and residual; with given statistics if there are some."""
        wanted = (self.x, self.weight, self.bias, self.residual)
        inputs = [t.double().requires_grad_() for t in wanted if t is not None]
        y = F.batch_norm(inputs[0], mean, var, inputs[1], inputs[2], mean is None, 0.1, EPS)
        y = y + inputs[3] if len(inputs) > 3 else y
        y = FUNCTIONS[self.activation](y)
        return y.detach(), list(torch.autograd.grad(y, inputs, self.gy.double()))

    def blocked(self, filling: float) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        residual = None if self.residual is None else blocked(self.residual, filling)
        return blocked(self.x, filling), self.weight.clone(), self.bias.clone(), residual


@pytest.fixture(params=CASES, ids=lambda c: f"residual={c[0]}-{c[1]}")
def options(request: pytest.FixtureRequest) -> tuple[bool, str]:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", list(LANES), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(shape: tuple[int, ...], dtype: torch.dtype, options: tuple[bool, str]) -> None:
    case = Case(shape, dtype, *options)
    expected, gradients = case.expected()
    inputs = [None if t is None else t.requires_grad_() for t in case.blocked(NAN)]
    y, mean, var = batch_norm2d_blocked(*inputs, case.n, EPS, case.activation)
    assert not mean.requires_grad
    assert not var.requires_grad
    assert y.dtype == dtype
    assert mean.dtype == var.dtype == compute_type(dtype)
    close(mean, case.mean)
    close(var, case.var)
    close(unblock(y, case.n), expected, case.loose)
    known = ops.batch_norm2d_blocked_given(inputs[0], mean, var, *inputs[1:], case.n, EPS, case.activation)
    close(unblock(known, case.n), expected, case.loose)
    wanted = [t for t in inputs if t is not None]
    for i, g in enumerate(torch.autograd.grad(y, wanted, blocked(case.gy, 0.0))):
        close(unblock(g, case.n) if g.dim() == 5 else g, gradients[i], case.loose)
        if g.dim() == 5:
            assert not rest(g, case.n).any()


@pytest.mark.parametrize("dtype", list(LANES), ids=str)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_given_statistics(shape: tuple[int, ...], dtype: torch.dtype, options: tuple[bool, str]) -> None:
    case = Case(shape, dtype, *options)
    channels = shape[1]
    bn = nn.BatchNorm2d(channels, EPS, dtype=compute_type(dtype)).eval()
    with torch.no_grad():
        bn.running_mean.copy_(torch.randn(channels))  # type: ignore[union-attr]
        bn.running_var.copy_(torch.rand(channels) + 0.5)  # type: ignore[union-attr]
        bn.weight.copy_(case.weight)
        bn.bias.copy_(case.bias)
    expected, gradients = case.expected(bn.running_mean.double(), bn.running_var.double())  # type: ignore[union-attr]
    x, _, _, residual = case.blocked(NAN)
    before = copy.deepcopy(bn.state_dict())
    wanted = [t.requires_grad_() for t in (x, bn.weight, bn.bias, residual) if t is not None]
    y = batch_norm_blocked(x, bn, case.n, residual, case.activation)
    close(unblock(y, case.n), expected, case.loose)
    for i, g in enumerate(torch.autograd.grad(y, wanted, blocked(case.gy, 0.0))):
        close(unblock(g, case.n) if g.dim() == 5 else g, gradients[i], case.loose)
        if g.dim() == 5:
            assert not rest(g, case.n).any()
    assert all(torch.equal(before[name], now) for name, now in bn.state_dict().items())
    # With frozen parameters too, where the input is not kept.
    bn.requires_grad_(False)
    y = batch_norm_blocked(x, bn, case.n, residual, case.activation)
    (g,) = torch.autograd.grad(y, x, blocked(case.gy, 0.0))
    close(unblock(g, case.n), gradients[0], case.loose)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [1000.0, 0.0])
def test_a_mean_far_from_zero(first: float, dtype: torch.dtype) -> None:
    # Sums of plain squares would lose the variance; nor does it matter if the first block is unlike the rest.
    n = 3 * LANES[dtype]
    x = torch.randn(n, 2, 9, 9) + 1000
    x[: n // 3] += first - 1000
    x = x.to(dtype)
    _, mean, var = batch_norm2d_blocked(blocked(x, NAN), None, None, None, n, EPS, "none")
    expected = x.double()
    torch.testing.assert_close(mean.double(), expected.mean((0, 2, 3)), rtol=4e-7, atol=0)
    torch.testing.assert_close(var.double(), expected.var((0, 2, 3), correction=0), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 5, 33])
def test_every_element_is_written_and_threads_agree(n: int, dtype: torch.dtype) -> None:
    case = Case((n, 5, 3, 5), dtype, True, "relu")
    x, weight, bias, residual = case.blocked(1.0)
    assert residual is not None
    # Filled with numbers: NaN would be the output's own in forward results, and gradients drop it.
    gy = blocked(case.gy, 1.0)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y, mean, var = torch.full_like(x, NAN), torch.full_like(weight, NAN), torch.full_like(weight, NAN)
            launch.forward(x, weight, bias, residual, n, EPS, "relu", out=(y, mean, var))
            other = torch.full_like(x, NAN)
            launch.affine(x, weight, bias, residual, n, "relu", out=other)
            results = [y, mean, var, other]
            parameters = weight, bias, mean, var
            for kind, kept in (("norm", x), ("affine", x), ("affine", None), ("gelu", x)):
                gradients = launch.Gradients(*(torch.full_like(t, NAN) for t in (x, weight, weight, x)))
                if kind == "norm":
                    more = n, EPS, "relu", True, gradients
                    launch.backward(gy, x, y, None, *parameters, *more)
                elif kind == "gelu":
                    more = n, EPS, "gelu", True, gradients
                    launch.backward(gy, x, None, residual, *parameters, *more)
                else:
                    affine = n, "relu", True, True, gradients
                    launch.affine_backward(gy, kept, y, None, weight, bias, *affine)
                results += gradients
                assert not rest(gradients.x, n).any()
                assert not rest(gradients.residual, n).any()
            assert all(t.isfinite().all() for t in results)
            found.append(results)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics(momentum: float | None, affine: bool, dtype: torch.dtype) -> None:
    theirs = nn.BatchNorm2d(3, momentum=momentum, affine=affine, dtype=torch.float64)
    ours = copy.deepcopy(theirs).to(compute_type(dtype))
    for n in (5, 16, 1, 20):
        x = (torch.randn(n, 3, 4, 5, dtype=torch.float64) * 2 + 1).to(dtype)
        close(unblock(batch_norm_blocked(blocked(x, NAN), ours, n), n), theirs(x.double()))
        assert torch.equal(ours.num_batches_tracked, theirs.num_batches_tracked)
        close(ours.running_mean, theirs.running_mean)
        close(ours.running_var, theirs.running_var)
    theirs.eval()
    ours.eval()
    close(unblock(batch_norm_blocked(blocked(x, NAN), ours, n), n), theirs(x.double()))


@pytest.mark.parametrize("training", [True, False])
def test_without_running_statistics(training: bool) -> None:
    bn = nn.BatchNorm2d(3, track_running_stats=False, dtype=torch.float64).train(training)
    x = torch.randn(5, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(unblock(batch_norm_blocked(blocked(x, NAN), bn, 5), 5), bn(x))


def test_numerical_gradients(options: tuple[bool, str]) -> None:
    case = Case((5, 2, 2, 3), torch.float64, *options)
    x, weight, bias, residual = case.blocked(0.0)
    inputs = tuple(t.requires_grad_() for t in (x, weight, bias, residual) if t is not None)

    # Nothing depends on the filling: differentiable results are those of the images.
    def training(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return unblock(batch_norm2d_blocked(x, weight, bias, residual, 5, EPS, case.activation)[0], 5)

    def given(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return unblock(affine_blocked(x, weight, bias, residual, 5, case.activation), 5)

    assert torch.autograd.gradcheck(training, inputs)
    assert torch.autograd.gradcheck(given, inputs)


@pytest.mark.parametrize(
    ("residual", "dtype"), [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)], ids=str
)
def test_declared_as_computed(residual: bool, dtype: torch.dtype) -> None:
    case = Case((5, 3, 4, 3), dtype, residual, "relu")
    inputs = [None if t is None else t.requires_grad_() for t in case.blocked(1.0)]
    for activation in ("relu", "none", "gelu"):
        torch.library.opcheck(OPERATORS.batch_norm2d_blocked.default, (*inputs, 5, EPS, activation))
        torch.library.opcheck(OPERATORS.affine_blocked.default, (*inputs, 5, activation))
    torch.library.opcheck(
        OPERATORS.batch_norm2d_blocked.default, (inputs[0], None, None, None, 5, EPS, "none")
    )
    x, weight, bias = (None if t is None else t.detach() for t in inputs[:3])
    torch.library.opcheck(OPERATORS.affine_blocked.default, (inputs[0], None, bias, None, 5, "gelu"))
    for activation in ("relu", "gelu"):
        kept = x, *((x, None) if activation == "relu" else (None, x))
        torch.library.opcheck(
            OPERATORS.batch_norm2d_blocked_backward.default,
            (x, *kept, weight, bias, bias, weight, 5, EPS, activation, residual),
            test_utils="test_faketensor",
        )
        for need_x in (True, False):
            torch.library.opcheck(
                OPERATORS.affine_blocked_backward.default,
                (x, *kept, weight, bias, 5, activation, need_x, residual),
                test_utils="test_faketensor",
            )


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_graph(momentum: float | None) -> None:
    theirs = nn.BatchNorm2d(3, momentum=momentum)
    ours = copy.deepcopy(theirs)

    def step(x: Tensor) -> Tensor:
        images = block_batch(x, LANES[x.dtype])
        return unblock_batch(batch_norm_blocked(images, ours, x.shape[0], images, "relu"), x.shape[0])

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for n in (5, 20):
        x, gy = torch.randn(n, 3, 4, 4, requires_grad=True), torch.randn(n, 3, 4, 4)
        y, expected = compiled(x), F.relu(theirs(x) + x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y, x, gy), torch.autograd.grad(expected, x, gy))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


def test_rounded_to_the_nearest_and_ties_to_even() -> None:
    # All of [1, 2): half a unit more lies between two numbers.
    x = (1 + torch.arange(128).view(2, 4, 4, 4) / 128).bfloat16()
    one, half = torch.ones(4), torch.full((4,), 2.0**-8)
    y = affine_blocked(blocked(x, 0.0), one, half, None, 2, "none")
    assert torch.equal(unblock(y, 2), (x.float() + half[0]).bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_diverged_training_stays_visible(dtype: torch.dtype) -> None:
    x = torch.randn(5, 2, 3, 3, dtype=dtype)
    x[2, 1, 0, 0] = NAN
    y, mean, _ = batch_norm2d_blocked(blocked(x, 0.0), None, None, None, 5, EPS, "relu")
    assert unblock(y, 5)[:, 1].isnan().all()
    assert mean.isnan().tolist() == [False, True]
    assert not unblock(y, 5)[:, 0].isnan().any()


def test_refusals() -> None:
    lanes = LANES[torch.float32]
    x, bn = torch.zeros(2, 3, 2, 2, lanes), nn.BatchNorm2d(3)
    cases: list[tuple[Any, Any, int, str]] = [
        (x.half(), bn, lanes + 1, "float16"),
        (x, copy.deepcopy(bn).double(), lanes + 1, "float64"),
        (x.bfloat16(), copy.deepcopy(bn).bfloat16(), lanes + 1, r"\[3\] of torch.float32 .*bfloat16, not"),
        (x, nn.BatchNorm2d(4), lanes + 1, r"\[3\].*\[4\]"),
        (x, nn.BatchNorm2d(3), lanes, "1 blocks, not 2"),
        (x[..., :-1], nn.BatchNorm2d(3), lanes + 1, "block_batch"),
        (x[:1, :, :1, :1], nn.BatchNorm2d(3), 1, "more than one number"),
        (x[:0], nn.BatchNorm2d(3), 0, "at least one image"),
    ]
    for given, layer, n, text in cases:
        with pytest.raises(UserError, match=text):
            batch_norm_blocked(given, layer, n)
    with pytest.raises(UserError, match="beside its input"):
        batch_norm_blocked(x, nn.BatchNorm2d(3), lanes + 1, residual=x[:1])
    with pytest.raises(UserError, match=r"of torch.bfloat16 beside its input"):
        batch_norm_blocked(x.bfloat16(), nn.BatchNorm2d(3), lanes + 1, residual=x)
