"""Triton's kernels in its interpreter, against dense convolution in float64, in poisoned memory."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import Phase as HypothesisPhase
from test_sparse_conv2d import make, problems
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.formats.packed import Structure, pack_values, unpack_values
from clicktrain.kernels.impls import PHASES, ConvProblem, Phase
from clicktrain.kernels.sparse_conv2d import IMPLS, sparse_conv2d
from clicktrain.kernels.sparse_conv2d.batch_innermost import ops
from clicktrain.kernels.sparse_conv2d.batch_innermost.plan import make_plan
from clicktrain.kernels.sparse_conv2d.batch_innermost.tiles import Tile, images_of_tile

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton")

TRITON = IMPLS["triton"]
BLOCKS = Tile("blocks", 16, 128, 16, 4, 2, splits=0)
ROWS = Tile("rows", 8, 128, 8, 4, 2)
HALF = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


class Layer:
    """A packed weight, its input and the dense convolution in float64; values are as the dtype has them."""

    def __init__(
        self,
        mask: Tensor,
        n: int,
        image: tuple[int, int],
        dtype: torch.dtype = torch.float64,
        *,
        groups: int = 1,
        values_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        f, c, _, _ = mask.shape
        self.options, self.groups, self.dtype = options, groups, dtype
        self.structure = Structure.from_mask(mask)
        kept = values_dtype or dtype

        def numbers(*shape: int, like: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(like)

        self.x = numbers(n, c * groups, *image)
        self.values = pack_values(self.structure, numbers(*mask.shape)).to(kept)
        self.bias = numbers(f, like=kept)
        weight = unpack_values(self.structure, self.values.double()).requires_grad_()
        x, bias = self.x.double().requires_grad_(), self.bias.double().requires_grad_()
        y = F.conv2d(x, weight, bias, groups=groups, **options)
        self.gy = numbers(*y.shape)
        gx, gw, gb = torch.autograd.grad(y, [x, weight, bias], self.gy.double())
        self.expected = y.detach(), gx, pack_values(self.structure, gw), gb
        pairs = {k: (v, v) if isinstance(v, int) else v for k, v in options.items()}
        named = {"dtype": str(kept)[6:], "activations": str(dtype)[6:]}
        self.problem = ConvProblem.of_structure(
            self.structure, image, n, groups=groups, **named, **pairs
        )  # fmt: skip

    def plan(self, tile: Tile) -> tuple[list[Tensor], str]:
        tiles: dict[Phase, Tile] = dict.fromkeys(PHASES, tile)
        plan, tables = make_plan(self.structure, self.problem, tiles)
        return tables, plan.to_json()

    def check(self, tile: Tile) -> None:
        x = innermost(self.x).requires_grad_()
        values, bias = (one.detach().requires_grad_() for one in (self.values, self.bias))
        y = ops.sparse_conv2d_batch_innermost(x, values, bias, *self.plan(tile))
        gx, gv, gb = torch.autograd.grad(y, [x, values, bias], innermost(self.gy))
        results = y.permute(3, 0, 1, 2), gx.permute(3, 0, 1, 2), gv, gb
        assert [one.dtype for one in results] == [self.dtype, self.dtype, values.dtype, values.dtype]
        for name, mine, expected in zip(("y", "gx", "gv", "gb"), results, self.expected, strict=True):
            assert_near(mine, expected, HALF[self.dtype], name)


def innermost(images: Tensor) -> Tensor:
    return images.permute(1, 2, 3, 0).contiguous()


def assert_near(mine: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    assert mine.shape == expected.shape, name
    if expected.numel():
        error = float(
            (mine.detach().double() - expected.detach()).abs().max() / (expected.detach().abs().max() + 1e-30)
        )
        assert error <= tolerance, (name, error)


def shared_mask(groups: int, size: int, channels: int, density: float = 0.3) -> Tensor:
    """``groups`` times ``size`` filters that share channels and patterns."""
    return (torch.rand(groups, channels, 3, 3) < density).repeat_interleave(size, 0)


@pytest.mark.parametrize("tile", [BLOCKS, ROWS], ids=str)
@pytest.mark.parametrize(
    ("n", "image", "options"),
    [
        (3, (4, 5), {"padding": 1}),
        (17, (3, 2), {"padding": (0, 1)}),
        (8, (5, 4), {"padding": (2, 1), "stride": 2, "dilation": (1, 2)}),
        (1, (5, 5), {"padding": 1, "stride": (3, 1), "groups": 2}),
    ],
    ids=["odd", "17-images", "strided-dilated", "grouped"],
)
def test_forward_and_gradients(tile: Tile, n: int, image: tuple[int, int], options: dict[str, Any]) -> None:
    Layer(torch.rand(6, 2, 3, 3) < 0.25, n, image, **options).check(tile)


@pytest.mark.parametrize("tile", [BLOCKS, ROWS], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_dtype_beside_weights_in_float32(tile: Tile, dtype: torch.dtype) -> None:
    mask = shared_mask(2, 4, 2)
    Layer(mask, 16, (3, 3), dtype, padding=1, values_dtype=torch.float32).check(tile)


def test_more_rows_than_a_block_and_empty_ones() -> None:
    mask = torch.rand(19, 2, 3, 3) < 0.2
    mask[:3] = False
    mask[:, 1] = False
    Layer(mask, 2, (4, 4), padding=1).check(BLOCKS)
    Layer(mask, 2, (4, 4), padding=1).check(ROWS)


@pytest.mark.parametrize("tile", [BLOCKS, ROWS], ids=str)
def test_nothing_is_kept(tile: Tile) -> None:
    Layer(torch.zeros(3, 2, 3, 3, dtype=torch.bool), 2, (4, 4), padding=1).check(tile)


@pytest.mark.parametrize("tile", [BLOCKS, ROWS], ids=str)
def test_a_stride_that_skips_positions_gives_them_no_gradient(tile: Tile) -> None:
    Layer(torch.ones(2, 2, 1, 1, dtype=torch.bool), 2, (5, 4), stride=(2, 3)).check(tile)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of NaN
@pytest.mark.parametrize("tile", [BLOCKS, ROWS], ids=str)
def test_a_numbers_place_depends_on_no_other_image(tile: Tile) -> None:
    """What one image holds, NaN for one, is in no other's result; nor are its infinities in the padding."""
    layer = Layer(torch.rand(4, 3, 3, 3) < 0.5, 9, (3, 3), padding=1)
    arguments = layer.plan(tile)
    x = innermost(layer.x)
    clean = ops.sparse_conv2d_batch_innermost(x, layer.values, None, *arguments)
    x[..., 4] = float("nan")
    y = ops.sparse_conv2d_batch_innermost(x, layer.values, None, *arguments)
    others = [at for at in range(9) if at != 4]
    assert torch.equal(y[..., others], clean[..., others])
    gy = innermost(layer.gy)
    clean = ops.sparse_conv2d_batch_innermost_dgrad(gy, layer.values, *arguments)
    gy[..., 4] = float("inf")
    gx = ops.sparse_conv2d_batch_innermost_dgrad(gy, layer.values, *arguments)
    assert torch.equal(gx[..., others], clean[..., others])


@pytest.mark.parametrize("splits", [1, 3, 100])
def test_wgrad_may_be_split(splits: int) -> None:
    layer = Layer(torch.rand(4, 2, 3, 3) < 0.4, 20, (3, 3), padding=1)
    for tile in (BLOCKS, ROWS):
        cut = Tile(tile.code, tile.m, 32, tile.bk, splits=splits)
        plan, tables = make_plan(layer.structure, layer.problem, {"wgrad": cut})
        x, gy = innermost(layer.x), innermost(layer.gy)
        shape = list(layer.values.shape)
        gv = ops.sparse_conv2d_batch_innermost_wgrad(x, gy, shape, tables, plan.to_json())
        assert_near(gv, layer.expected[2], 1e-12)


@pytest.mark.parametrize("tile", [BLOCKS, ROWS], ids=str)
def test_statistics_of_the_results_are_taken_on_the_way(tile: Tile) -> None:
    layer = Layer(torch.rand(5, 3, 3, 3) < 0.4, 5, (4, 5), torch.float32, padding=1)
    layer.x += 1000  # sums of squares would lose all digits
    bias = layer.bias
    y, mean, var = ops.sparse_conv2d_batch_innermost_statistics(
        innermost(layer.x), layer.values, bias, *layer.plan(tile), 5
    )
    variance, expected = torch.var_mean(y.double(), (1, 2, 3), correction=0)
    assert_near(mean, expected, 1e-6)
    assert_near(var, variance, 1e-4)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("tile", [BLOCKS, ROWS], ids=str)
def test_a_batch_norm_with_known_statistics_and_relu_are_part_of_it(tile: Tile) -> None:
    layer = Layer(torch.rand(5, 3, 3, 3) < 0.4, 5, (4, 5), padding=1, stride=2)
    scale, shift = torch.randn(2, 5, dtype=torch.float64)
    arguments = layer.plan(tile)
    x, plain = innermost(layer.x), layer.expected[0] - layer.bias[:, None, None]
    expected = plain * scale[:, None, None] + shift[:, None, None]
    residual = torch.randn_like(expected)
    for added, relu in ((None, False), (residual, True)):
        other = None if added is None else innermost(added)
        y = ops.sparse_conv2d_batch_innermost_affine(x, layer.values, scale, shift, other, relu, *arguments)
        total = expected if added is None else expected + added
        assert_near(y.permute(3, 0, 1, 2), total.relu() if relu else total, 1e-12)
    layer.values[0] = float("nan")  # a NaN has to be seen
    y = ops.sparse_conv2d_batch_innermost_affine(x, layer.values, scale, shift, None, True, *arguments)
    assert bool(y.isnan().any())


@given(problem=problems())
@settings(
    max_examples=3,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[HypothesisPhase.explicit, HypothesisPhase.generate],  # the interpreter is too slow to shrink with
)
def test_the_operator_as_the_other_implementations(problem: dict[str, Any]) -> None:
    torch.manual_seed(problem["seed"])
    options, shape = problem["options"], problem["shape"]
    n, h, w = problem["x"]
    size = (n, shape[1] * options["groups"], h, w)
    x, weight, mask, bias = make(shape, size, problem["density"], problem["equal"], problem["bias"])
    structure = Structure.from_mask(mask)
    values = pack_values(structure, weight).detach().requires_grad_()
    expected = F.conv2d(x, weight * mask, bias, **options)
    y = sparse_conv2d(x, values, structure, bias, **options, impl="triton")
    assert_near(y, expected, 1e-12)
    grad = torch.randn_like(expected)
    inputs = [x] if bias is None else [x, bias]
    *mine, dv = torch.autograd.grad(y, [*inputs, values], grad)
    *theirs, ew = torch.autograd.grad(expected, [*inputs, weight], grad)
    for one, other in zip((*mine, unpack_values(structure, dv)), (*theirs, ew), strict=True):
        assert_near(one, other, 1e-11)


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = ConvProblem(4, 3, 2, (3, 3), (8, 8), device="cuda")
    assert TRITON.refusals(problem) == []

    def reasons(**changes: Any) -> list[str]:
        from dataclasses import replace

        return TRITON.refusals(replace(problem, **changes))

    assert reasons(device="cpu") == ["it runs on cuda, not on cpu"]
    assert reasons(dtype="int8") == ["it has no weights in int8"]
    assert reasons(dtype="bfloat16") == ["it does not keep activations in float32 beside bfloat16"]
    assert reasons(activations="float16") == []
    assert reasons(image=(2, 8)) == ["a kernel of (3, 3) does not fit images of (2, 8)"]
    assert reasons(image=(9000, 8)) == ["images, reach and padding are at most 8000 here"]
    layer = Layer(torch.ones(2, 2, 3, 3, dtype=torch.bool), 2, (3, 4))
    arguments = layer.plan(BLOCKS)
    with pytest.raises(UserError, match=r"x has to be \[2, 3, 4, N\], not \[2, 2, 3, 4\]"):
        ops.sparse_conv2d_batch_innermost(layer.x, layer.values, None, *arguments)
    with pytest.raises(UserError, match="activations of one of float32, float64, bfloat16, float16"):
        ops.sparse_conv2d_batch_innermost(innermost(layer.x).int(), layer.values, None, *arguments)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match="run on GPUs; on the CPU its interpreter"):
        ops.sparse_conv2d_batch_innermost(innermost(layer.x), layer.values, None, *arguments)
    with pytest.raises(
        ValueError, match="impl='triton' cannot run this layer: on the CPU Triton's interpreter"
    ):
        sparse_conv2d(layer.x, layer.values, layer.structure, impl="triton")


def test_images_of_a_tile_leave_few_columns_over() -> None:
    sizes = {n: images_of_tile(n, 128) for n in (1, 8, 17, 64, 96, 100, 128, 256, 1000)}
    assert sizes == {1: 8, 8: 8, 17: 8, 64: 64, 96: 32, 100: 8, 128: 128, 256: 128, 1000: 8}
