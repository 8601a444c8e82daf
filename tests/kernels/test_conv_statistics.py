"""Statistics of batch norm taken in the convolution's epilogue, against dense convolution in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from slow_layout import unblock
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.formats.packed import Structure, pack_values
from clicktrain.kernels.batch_norm2d import batch_norm_blocked, launch
from clicktrain.kernels.native import C_TYPES, STORED_TYPES, toolchain
from clicktrain.kernels.sparse_conv2d.blocked.codegen import source
from clicktrain.kernels.sparse_conv2d.blocked.launch import forward_statistics
from clicktrain.kernels.sparse_conv2d.blocked.ops import sparse_conv2d_blocked_statistics
from clicktrain.kernels.sparse_conv2d.blocked.prepared import prepare
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Tiling

TOOLS = toolchain()
OPERATORS = torch.ops.clicktrain
pytestmark = [
    pytest.mark.skipif(TOOLS is None, reason="there is no C compiler"),
    pytest.mark.usefixtures("poisoned_memory"),
]
LANES = {dtype: TOOLS.lanes(dtype) if TOOLS else 1 for dtype in STORED_TYPES}
NAN = float("nan")
EPS = 1e-5
# Of the variance, and of the deviation for the mean: in float32 a mean of 100 deviations is itself known to
# 1e-5 of them, and so is every number that the variance is taken of.
RELATIVE = {torch.float32: 3e-5, torch.float64: 1e-11}


def blocked(x: Tensor, filling: float = NAN) -> Tensor:
    """[N, C, H, W] -> [B, C, H, W, V] with something in the filling lanes."""
    lanes = LANES[x.dtype]
    out = x.new_full((-(-len(x) // lanes) * lanes, *x.shape[1:]), filling)
    out[: len(x)] = x
    return out.view(-1, lanes, *x.shape[1:]).permute(0, 2, 3, 4, 1).contiguous()


class Layer:
    """A sparse convolution of one shape, its input and what float64 makes of it."""

    def __init__(
        self,
        n: int,
        image: tuple[int, int],
        tiling: Tiling | None,
        *,
        filters: int = 6,
        channels: int = 5,
        kernel: tuple[int, int] = (3, 3),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (1, 1),
        dtype: torch.dtype = torch.float32,
        bias: float | None = None,
        share: int = 1,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        kept = torch.rand(filters // share, channels, *kernel, generator=generator) < 0.4
        self.structure = Structure.from_mask(kept.repeat_interleave(share, 0))
        problem = ConvProblem.make(channels, filters, kernel, image, stride, padding)
        tilings: Mapping[Any, Tiling] = {} if tiling is None else {"forward": tiling}
        plan, tables = prepare(self.structure, problem, 1, tilings)
        self.n, self.text, self.tables = n, plan.to_json(), list(tables)
        self.x = torch.randn(n, channels, *image, generator=generator, dtype=torch.float64).to(dtype)
        weight = torch.randn(kept.shape, generator=generator, dtype=torch.float64).repeat_interleave(share, 0)
        self.values = pack_values(self.structure, weight).to(dtype)
        self.bias = None if bias is None else torch.randn(filters, generator=generator).to(dtype) + bias
        self.conv = lambda x, w, b: F.conv2d(x, w, b, stride, padding)

    def dense(self) -> Tensor:
        """The result in float64, of the numbers as they are in the layer's own type."""
        mask = self.structure.mask()
        weight = torch.zeros(mask.shape, dtype=torch.float64)
        weight[mask] = self.values.double().flatten()
        return self.conv(self.x.double(), weight, None if self.bias is None else self.bias.double())

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        return forward_statistics(blocked(self.x), self.values, self.bias, self.tables, self.text, self.n)


def check(layer: Layer, relative: float | None = None) -> None:
    """Result, mean and variance against float64."""
    want = layer.dense()
    y, mean, var = layer.run()
    relative = relative or RELATIVE[layer.x.dtype]
    scale = max(float(want.abs().max()), 1.0)
    torch.testing.assert_close(unblock(y, layer.n).double(), want, rtol=0, atol=relative * scale)
    deviation = want.var((0, 2, 3), correction=0).sqrt()
    rounding = relative * want.abs().amax((0, 2, 3))  # of what the kernel wrote, whoever takes the mean
    assert ((mean.double() - want.mean((0, 2, 3))).abs() <= relative * deviation + 0.1 * rounding).all()
    assert ((var.double().sqrt() - deviation).abs() <= relative * deviation + 0.1 * rounding).all()
    # And closely against what was written: that is what batch norm would have read.
    own = unblock(y, layer.n).double()
    center = own.mean((0, 2, 3))
    precision = 0.1 * relative * deviation + torch.finfo(y.dtype).eps * center.abs()
    assert ((mean.double() - center).abs() <= precision + 1e-12 * scale).all()
    torch.testing.assert_close(
        var.double(), own.var((0, 2, 3), correction=0), rtol=relative / 3, atol=1e-12 * scale
    )


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    kernel = draw(st.sampled_from([(3, 3), (1, 1), (1, 3), (2, 2)]))
    tile, region = draw(st.sampled_from([(1, 1), (2, 3), (4, 3)])), draw(st.sampled_from([(1, 1), (2, 3)]))
    share = draw(st.sampled_from([1, 2]))
    tiling = Tiling(tile, region, share, draw(st.sampled_from(["unrolled", "cache_blocked", "indexed"])))
    if tiling.code != "unrolled":
        parts = {"sources": draw(st.integers(0, 3))}
        if tiling.code == "cache_blocked":
            parts["results"] = draw(st.integers(0, 4))
        tiling = Tiling(tile, region, code=tiling.code, **parts)
    return {
        "n": draw(st.sampled_from([1, 3, 16, 21])),
        "image": (draw(st.integers(3, 11)), draw(st.integers(3, 11))),
        "tiling": draw(st.sampled_from([tiling, tiling, None])),
        "kernel": kernel,
        "stride": (draw(st.integers(1, 2)), draw(st.integers(1, 3))),
        "padding": (draw(st.integers(0, 1)), draw(st.integers(0, 2))),
        "dtype": draw(st.sampled_from(list(C_TYPES))),
        "bias": draw(st.sampled_from([None, 0.0, 300.0])),
        "share": share,
        "seed": draw(st.integers(0, 100)),
    }


@settings(max_examples=24)
@given(layers())
def test_equal_those_of_dense_convolution(case: dict[str, Any]) -> None:
    check(Layer(**case))


@pytest.mark.parametrize("code", ["unrolled", "cache_blocked", "indexed"])
def test_padding_wider_than_a_window(code: Any) -> None:
    check(Layer(3, (5, 4), Tiling((1, 1), code=code), kernel=(1, 1), stride=(1, 3), padding=(0, 2)))


@pytest.mark.parametrize(
    "tiling",
    [
        Tiling((2, 4), (2, 2)),
        Tiling((3, 4), code="cache_blocked", results=2),
        Tiling((3, 4), code="indexed"),
        Tiling((3, 4), code="indexed", pairs=True),
    ],
    ids=["unrolled", "cache_blocked", "indexed", "pairs"],
)
def test_of_results_as_they_were_before_they_are_kept_in_bfloat16(tiling: Tiling) -> None:
    layer = Layer(19, (9, 7), tiling, dtype=torch.bfloat16, bias=3.0)
    want = layer.dense()
    # Parameters are float32; these are numbers of bfloat16, so that pairs of them are exact.
    layer.values, layer.bias = layer.values.float(), layer.bias.float()  # type: ignore[union-attr]
    y, mean, var = layer.run()
    assert y.dtype is torch.bfloat16
    assert mean.dtype is var.dtype is torch.float32
    torch.testing.assert_close(unblock(y, layer.n).double(), want, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(mean.double(), want.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), want.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-5)


SETS, TAPS = Tiling((2, 4), (2, 2)), Tiling((3, 4), (2, 2), code="indexed", sources=2)
SWEEP = Tiling((4, 3), (1, 2), code="cache_blocked", sources=2, results=4)
every_code = pytest.mark.parametrize(
    "tiling", [SETS, SWEEP, TAPS], ids=["unrolled", "cache_blocked", "indexed"]
)


@every_code
@pytest.mark.parametrize("mean", [100.0, 1e4])
def test_a_mean_far_from_zero(tiling: Tiling, mean: float) -> None:
    # Deviations are about 4: sums of plain squares in float32 would leave nothing of them.
    layer = Layer(19, (13, 9), tiling, bias=mean * 4)
    own = unblock(layer.run()[0], layer.n).double()
    assert (own.mean((0, 2, 3)) > 50 * own.var((0, 2, 3)).sqrt()).all()
    check(layer)


@every_code
def test_long_sums_and_a_first_value_unlike_the_rest(tiling: Tiling) -> None:
    layer = Layer(2 * LANES[torch.float32] + 3, (40, 37), tiling, filters=2, channels=2, bias=0.0)
    layer.x[:, :, 0, 0] = 1000.0
    # The worst there is: sums begin at the one number in 1480 that makes up the variance.
    check(layer, 2 * 1480 * torch.finfo(torch.float32).eps)


@every_code
@pytest.mark.parametrize("n", [1, 17, 45])
def test_any_number_of_threads(tiling: Tiling, n: int) -> None:
    layer = Layer(n, (9, 10), tiling, stride=(2, 1), bias=50.0)
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            check(layer)
            first = layer.run()
            for _ in range(5):  # threads may take other regions, or parts of them, every time
                for a, b in zip(first[1:], layer.run()[1:], strict=True):
                    assert torch.equal(a, b)
    finally:
        torch.set_num_threads(1)


def test_filters_without_weights_have_no_variance() -> None:
    structure = Structure.from_mask(torch.zeros(3, 2, 3, 3, dtype=torch.bool))
    plan, tables = prepare(structure, ConvProblem.make(2, 3, (3, 3), (4, 4)))
    x, bias = blocked(torch.randn(5, 2, 4, 4)), torch.tensor([0.0, 1.0, -2.0])
    values = torch.zeros(structure.values_shape)
    _, mean, var = forward_statistics(x, values, bias, list(tables), plan.to_json(), 5)
    assert torch.equal(mean, bias)
    assert not var.any()


def test_a_diverged_training_stays_visible() -> None:
    layer = Layer(5, (4, 4), TAPS)
    layer.x[2, :, 1, 1] = NAN
    _, mean, var = layer.run()
    assert mean.isnan().all()
    assert var.isnan().all()


@every_code
@pytest.mark.parametrize("options", [(False, False), (True, True)], ids=["plain", "residual-relu"])
def test_gradients_of_convolution_and_norm(tiling: Tiling, options: tuple[bool, bool]) -> None:
    layer = Layer(11, (6, 5), tiling, dtype=torch.float64, bias=30.0)
    theirs = nn.BatchNorm2d(6, dtype=torch.float64)
    nn.init.uniform_(theirs.weight)
    ours = copy.deepcopy(theirs)
    shape = layer.dense().shape
    gy = torch.randn(shape, dtype=torch.float64)
    residual = torch.randn(shape, dtype=torch.float64) if options[0] else None

    mask = layer.structure.mask()
    assert layer.bias is not None
    x, values, bias = (t.clone().requires_grad_() for t in (layer.x, layer.values, layer.bias))
    other = None if residual is None else residual.clone().requires_grad_()
    weight = torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, values)
    want = theirs(layer.conv(x, weight, bias))
    want = want if other is None else want + other
    want = want.relu() if options[1] else want
    expected = torch.autograd.grad(
        want, [x, values, *theirs.parameters(), *([other] if options[0] else [])], gy
    )

    own_x, own_values = blocked(layer.x, 0.0).requires_grad_(), layer.values.clone().requires_grad_()
    own_bias = layer.bias.clone().requires_grad_()
    own_other = None if residual is None else blocked(residual).requires_grad_()
    y, mean, var = sparse_conv2d_blocked_statistics(
        own_x, own_values, own_bias, layer.tables, layer.text, layer.n
    )
    assert not mean.requires_grad
    assert not var.requires_grad
    activation = "relu" if options[1] else "none"
    normed = batch_norm_blocked(y, ours, layer.n, own_other, activation, (mean, var))
    torch.testing.assert_close(unblock(normed, layer.n), want)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    wanted = [own_x, own_values, *ours.parameters(), *([own_other] if options[0] else [])]
    found = torch.autograd.grad(normed, [*wanted, own_bias], blocked(gy, 0.0))
    for mine, their in zip(found, expected, strict=False):
        torch.testing.assert_close(unblock(mine, layer.n) if mine.dim() == 5 else mine, their)
    assert float(found[-1].abs().max()) < 1e-10  # batch norm takes every bias out again


@pytest.mark.parametrize("channels", [3, 37])
def test_every_element_of_the_norm_is_written(channels: int) -> None:
    lanes = LANES[torch.float32]
    x, mean, var = torch.randn(2, channels, 3, 5, lanes), torch.randn(channels), torch.rand(channels)
    want = (x - mean.view(-1, 1, 1, 1)) / (var.view(-1, 1, 1, 1) + EPS).sqrt()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = torch.full_like(x, NAN)
            launch.given(x, mean, var, None, None, None, lanes + 1, EPS, "none", out=y)
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(1)


def test_declared_as_computed() -> None:
    torch.use_deterministic_algorithms(False)
    layer = Layer(5, (4, 5), None, dtype=torch.float64, bias=0.0)
    assert layer.bias is not None
    x, values, bias = blocked(layer.x, 0.0), layer.values, layer.bias
    inputs = [t.requires_grad_() for t in (x, values, bias)]
    torch.library.opcheck(
        OPERATORS.sparse_conv2d_blocked_statistics.default,
        (*inputs, layer.tables, layer.text, layer.n),
    )
    with torch.no_grad():
        y, mean, var = sparse_conv2d_blocked_statistics(*inputs, layer.tables, layer.text, layer.n)
    for weight in (None, torch.rand(6, dtype=torch.float64, requires_grad=True)):
        residual = None if weight is None else torch.randn_like(y).requires_grad_()
        arguments = (
            y.requires_grad_(),
            mean,
            var,
            weight,
            weight,
            residual,
            layer.n,
            EPS,
            "none" if weight is None else "relu",
        )
        torch.library.opcheck(OPERATORS.batch_norm2d_blocked_given.default, arguments)


class _Block(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.tables, self.text, self.n = layer.tables, layer.text, layer.n
        self.values, self.norm = nn.Parameter(layer.values), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y, mean, var = sparse_conv2d_blocked_statistics(x, self.values, None, self.tables, self.text, self.n)
        return batch_norm_blocked(y, self.norm, self.n, None, "relu", (mean, var))


@pytest.mark.filterwarnings("ignore")
def test_one_graph() -> None:
    torch.use_deterministic_algorithms(False)
    layer = Layer(5, (4, 5), None)
    ours, theirs = _Block(layer), _Block(layer)
    x = blocked(layer.x, 0.0).requires_grad_()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    y, want = compiled(x), theirs(x)
    assert torch.equal(y, want)
    (a,), (b,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(want.sum(), x)
    assert torch.equal(a, b)
    assert torch.equal(ours.norm.running_var, theirs.norm.running_var)  # type: ignore[arg-type]
    exported = torch.export.export(theirs, (x.detach(),))
    assert sum("sparse_conv2d_blocked_statistics" in str(node.target) for node in exported.graph.nodes) == 1
    assert torch.equal(exported.module()(x.detach()), theirs(x))


def test_refusals() -> None:
    layer = Layer(3, (4, 4), None)
    x = blocked(layer.x)
    for given_x, n in ((x, 0), (x, LANES[torch.float32] + 1), (x[:0], 0)):
        with pytest.raises(UserError, match=f"no batch of {n} images"):
            forward_statistics(given_x, layer.values, None, layer.tables, layer.text, n)
    problem = ConvProblem.make(5, 6, (3, 3), (4, 4))
    with pytest.raises(ValueError, match="not of dgrad"):
        source("dgrad", problem, (), SETS, torch.float32, 8, sums=True)
    y, mean, var = layer.run()
    with pytest.raises(UserError, match=r"\[6\].*\[5\]"):
        launch.given(y, mean[:5], var, None, None, None, 3, EPS, "none")
