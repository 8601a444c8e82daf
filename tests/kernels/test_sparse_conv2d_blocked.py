"""Generated convolution kernels against dense convolution in float64, on poisoned memory, over odd shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from slow_layout import block, unblock
from torch import Tensor

from clicktrain.formats.packed import Structure, pack_values, unpack_values
from clicktrain.kernels.native import compute_type, toolchain
from clicktrain.kernels.sparse_conv2d.blocked import launch
from clicktrain.kernels.sparse_conv2d.blocked.ops import sparse_conv2d_blocked
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tables import NARROW
from clicktrain.kernels.sparse_conv2d.blocked.prepared import prepare
from clicktrain.kernels.sparse_conv2d.blocked.problem import PHASES, ConvProblem, Phase, Tiling

pytestmark = [
    pytest.mark.skipif(toolchain() is None, reason="there is no C compiler"),
    pytest.mark.usefixtures("poisoned_memory"),
]

PATTERNS = ((0, 1, 3, 4), (1, 2, 4, 5), (3, 4, 6, 7), (1, 3, 4, 5), (1, 4, 5, 7))
# Of the largest number; what is kept in bfloat16 is computed in float32, and then rounded.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-14, torch.bfloat16: 3e-6}
ROUNDING = {torch.bfloat16: 2**-8}


def pattern_mask(f: int, c: int, density: float, group: int, generator: torch.Generator) -> Tensor:
    """Four of nine positions in some kernels; ``group`` neighbouring filters alike."""
    mask = torch.zeros(f, c, 9, dtype=torch.bool)
    for i in range(0, f, group):
        for ch in (torch.rand(c, generator=generator) < density).nonzero().flatten().tolist():
            pattern = PATTERNS[int(torch.randint(len(PATTERNS), (1,), generator=generator))]
            mask[i : i + group, ch, list(pattern)] = True
    return mask.view(f, c, 3, 3)


def check(
    mask: Tensor,
    n: int,
    image: tuple[int, int],
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] | str = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    threads: int = 1,
    tilings: Any = None,
) -> None:
    """Output and all gradients equal to those of ``F.conv2d`` in float64."""
    tools = toolchain()
    assert tools is not None
    lanes = tools.lanes(dtype)
    structure = Structure.from_mask(mask)
    f, c, r, s = structure.shape
    problem = ConvProblem.make(c * groups, f, (r, s), image, stride, padding, dilation)
    plan, tables = prepare(structure, problem, groups, tilings)
    x = torch.randn(n, c * groups, *image, dtype=torch.float64).to(dtype).double().requires_grad_()
    weight = (torch.randn(mask.shape, dtype=torch.float64) * mask).to(dtype).double().requires_grad_()
    offset = torch.randn(f, dtype=torch.float64, requires_grad=True)
    want = F.conv2d(x, weight, offset if bias else None, stride, padding, dilation, groups)
    gy = torch.randn_like(want).to(dtype).double()
    want.backward(gy)
    assert x.grad is not None
    assert weight.grad is not None

    parameters = compute_type(dtype)
    own_x = x.detach().to(dtype).requires_grad_()
    values = pack_values(structure, weight.detach()).to(parameters).requires_grad_()
    own_offset = offset.detach().to(parameters).requires_grad_()
    torch.set_num_threads(threads)
    try:
        y = sparse_conv2d_blocked(
            block(own_x, lanes), values, own_offset if bias else None, list(tables), plan.to_json()
        )
        unblock(y, n).backward(gy.to(dtype))
    finally:
        torch.set_num_threads(1)
    near(unblock(y, n), want, dtype)
    near(own_x.grad, x.grad, dtype)
    near(values.grad, pack_values(structure, weight.grad), dtype, terms=want[:, 0].numel())
    if bias:
        near(own_offset.grad, offset.grad, dtype)


def near(own: Tensor | None, want: Tensor | None, dtype: torch.dtype, terms: int = 1) -> None:
    """Equal but for rounding; sums of ``terms`` products may be small by chance, their rounding is not."""
    assert own is not None
    assert want is not None
    assert own.shape == want.shape
    if want.numel():
        bound = TOLERANCE[dtype] * max(float(want.detach().abs().max()), terms**0.5)
        bound = bound + ROUNDING.get(own.dtype, 0.0) * want.detach().abs()
        assert bool(((own.detach() - want.detach()).abs() <= bound).all())


def sweeps(
    tile: tuple[int, int], region: tuple[int, int], stride: tuple[int, int], sources: int, results: int
) -> dict[Phase, Tiling]:
    """Sums in the cache, of blocks of results over passes of sources; the gradient of the weight has none."""
    own = Tiling(tile, region, code="cache_blocked", sources=sources, results=results)
    back = replace(own, tile=(tile[0] * stride[0], tile[1] * stride[1]), sources=results, results=sources)
    return {"forward": own, "dgrad": back}


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    r, s = draw(st.sampled_from([(3, 3), (1, 1), (1, 3), (2, 2), (5, 5)]))
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    f, c = draw(st.integers(1, 9)) * groups, draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    density = draw(st.sampled_from([0.0, 0.1, 0.4, 1.0]))
    kind = draw(st.sampled_from(["patterns", "unstructured", "kernels"]))
    if kind == "patterns" and (r, s) == (3, 3):
        mask = pattern_mask(f, c, density, draw(st.sampled_from([1, 2, 4])), generator)
    elif kind == "kernels":
        mask = (torch.rand(f, c, 1, 1, generator=generator) < density).expand(f, c, r, s).clone()
    else:
        mask = torch.rand(f, c, r, s, generator=generator) < density
    dilation = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    padding = (draw(st.integers(0, r)), draw(st.integers(0, s)))
    image = tuple(
        draw(st.integers(max(1, (k - 1) * d + 1 - 2 * p), 13))
        for k, d, p in zip((r, s), dilation, padding, strict=True)
    )
    stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    pairs = dtype is torch.bfloat16 and draw(st.booleans())
    code = draw(
        st.sampled_from(["by rule", "unrolled", "cache_blocked", "cache_blocked", "indexed", "indexed"])
    )
    tile = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    region = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    tilings = None
    if code == "unrolled":
        own = Tiling(tile, region, sources=draw(st.integers(0, 4)), pairs=pairs)
        back = replace(own, tile=(tile[0] * stride[0], tile[1] * stride[1]))
        weight = replace(own, sources=0, images=draw(st.integers(1, 3)))
        tilings = {"forward": own, "wgrad": weight, "dgrad": back}
    elif code == "cache_blocked":
        tile = draw(st.integers(1, 7)), draw(st.integers(1, 7))
        tilings = sweeps(tile, region, stride, draw(st.integers(0, 5)), draw(st.integers(0, 5)))
    elif code == "indexed":
        images, sources = draw(st.integers(1, 3)), draw(st.integers(0, 4))
        own = Tiling(tile, region, code="indexed", sources=sources, images=images, pairs=pairs)
        tilings = dict.fromkeys(PHASES, own)
    return {
        "mask": mask,
        "n": draw(st.sampled_from([1, 3, 16, 17])),
        "image": image,
        "stride": stride,
        "tilings": tilings,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "dtype": dtype,
        "threads": draw(st.sampled_from([1, 1, 2, 5])),
    }


@settings(max_examples=24)
@given(cases())
def test_equals_dense_convolution(case: dict[str, Any]) -> None:
    check(**case)


@pytest.mark.parametrize("code", ["unrolled", "cache_blocked", "indexed"])
@pytest.mark.parametrize("n", [1, 40])
def test_results_do_not_depend_on_threads(code: Any, n: int) -> None:
    # Whichever thread takes which part of a region, or which region.
    tools = toolchain()
    assert tools is not None
    mask = pattern_mask(10, 7, 0.6, 1, torch.Generator().manual_seed(1))
    tiling = Tiling((3, 2), (2, 2), code=code)
    if code == "cache_blocked":
        tiling = replace(tiling, sources=3, results=2)
    structure, problem = Structure.from_mask(mask), ConvProblem.make(7, 10, (3, 3), (9, 8), padding=(1, 1))
    plan, tables = prepare(structure, problem, 1, {"forward": tiling, "dgrad": tiling})
    values, index = torch.randn(structure.values_shape), list(tables)
    lanes = tools.lanes(torch.float32)
    x, gy = (block(torch.randn(n, planes, 9, 8), lanes).nan_to_num() for planes in (7, 10))
    y = launch.forward(x, values, None, index, plan.to_json())
    gx = launch.dgrad(gy, values, index, plan.to_json())
    near(unblock(y, n), F.conv2d(unblock(x, n), unpack_values(structure, values), padding=1), torch.float32)
    try:
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for _ in range(5):
                assert torch.equal(launch.forward(x, values, None, index, plan.to_json()), y)
                assert torch.equal(launch.dgrad(gy, values, index, plan.to_json()), gx)
    finally:
        torch.set_num_threads(1)


_FEWER_THREADS = """
import torch
from clicktrain.formats.packed import Structure
from clicktrain.kernels.sparse_conv2d.blocked import launch
from clicktrain.kernels.blocked_layout import block_batch
from clicktrain.kernels.sparse_conv2d.blocked.prepared import prepare
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem
from clicktrain.kernels.native import toolchain

structure = Structure.from_mask(torch.rand(4, 3, 3, 3) < 0.5)
plan, tables = prepare(structure, ConvProblem.make(3, 4, (3, 3), (6, 6)))
x = block_batch(torch.randn(64, 3, 6, 6), toolchain().lanes(torch.float32))
values = torch.randn(structure.values_shape)
torch.set_num_threads(1)
want = launch.forward_statistics(x, values, None, list(tables), plan.to_json(), 64)
torch.set_num_threads(4)
for _ in range(3):
    own = launch.forward_statistics(x, values, None, list(tables), plan.to_json(), 64)
    assert torch.equal(own[0], want[0])
    torch.testing.assert_close(own[1:], want[1:])
print("the same")
"""


def test_fewer_threads_than_asked_for() -> None:
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _FEWER_THREADS], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout == "the same\n", done.stderr


SIZES = [(4, 4), (7, 7), (8, 8), (9, 5), (14, 14), (33, 18)]


@pytest.mark.parametrize("image", SIZES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_pattern_layers(image: tuple[int, int], stride: int) -> None:
    mask = pattern_mask(12, 10, 0.3, 1, torch.Generator().manual_seed(1))
    check(mask, 20, image, stride=(stride, stride), padding=(1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filters", [2, 4])
@pytest.mark.parametrize("image", [(4, 4), (11, 6)], ids=str)
def test_filters_that_share_positions_are_computed_together(
    filters: int, image: tuple[int, int], dtype: torch.dtype
) -> None:
    mask = pattern_mask(16, 10, 0.3, filters, torch.Generator().manual_seed(2))
    structure = Structure.from_mask(mask)
    tiling = Tiling((2, 3), (2, 2), filters, sources=4, pairs=dtype is torch.bfloat16)
    tilings = {"forward": tiling, "wgrad": replace(tiling, sources=0)}
    plan, _ = prepare(structure, ConvProblem.make(10, 16, (3, 3), image, (1, 1), (1, 1)), 1, tilings)
    assert plan.tiling("forward").filters_per_tile == filters
    check(mask, 17, image, padding=(1, 1), bias=True, tilings=tilings, dtype=dtype)


def test_filters_that_differ_are_not_computed_together() -> None:
    mask = pattern_mask(16, 10, 0.3, 8, torch.Generator().manual_seed(2))
    mask[3, mask[3].flatten(1).any(1).nonzero()[0, 0]] = True
    plan, _ = prepare(Structure.from_mask(mask), ConvProblem.make(10, 16, (3, 3), (8, 8)))
    assert plan.tiling("forward").filters_per_tile == 1
    check(mask, 16, (8, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("image", "pairs"), [((3, 3), False), ((5, 7), True)], ids=str)
def test_regions_of_several_images(image: tuple[int, int], pairs: bool, dtype: torch.dtype) -> None:
    # Five blocks with 16 lanes, in regions of two and four: read in place, and copied.
    mask = pattern_mask(6, 5, 0.5, 1, torch.Generator().manual_seed(6))
    for images in (2, 4):
        tiling = Tiling((3, 4), (1, 2), images=images, pairs=pairs and dtype is torch.bfloat16)
        check(mask, 70, image, padding=(1, 1), dtype=dtype, threads=2, tilings={"wgrad": tiling})


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize(("n", "image"), [(1, (4, 4)), (16, (7, 7)), (40, (12, 12))], ids=str)
def test_threads_change_nothing(threads: int, n: int, image: tuple[int, int]) -> None:
    """Few regions are shared out by kernels, many by images: both splits."""
    mask = pattern_mask(24, 20, 0.3, 1, torch.Generator().manual_seed(3))
    check(mask, n, image, padding=(1, 1), threads=threads)


@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (4, 5), (16, 1)], ids=str)
@pytest.mark.parametrize("region", [(1, 1), (2, 3), pytest.param((8, 8), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_tiling_gives_the_same(tile: tuple[int, int], region: tuple[int, int], stride: int) -> None:
    mask = pattern_mask(6, 5, 0.5, 1, torch.Generator().manual_seed(4))
    if region != (1, 1):
        taps = Tiling(tile, region, code="indexed", sources=region[0], images=region[1])
        check(
            mask, 20, (11, 10), stride=(stride, stride), padding=(1, 1), tilings=dict.fromkeys(PHASES, taps)
        )
        swept = sweeps(tile, region, (stride, stride), region[0], region[1])
        check(mask, 20, (11, 10), stride=(stride, stride), padding=(1, 1), tilings=swept)
    back = Tiling((tile[0] * stride, tile[1] * stride), region)
    own = Tiling(tile, region)
    tilings = {"forward": own, "wgrad": own, "dgrad": back}
    check(mask, 4, (11, 10), stride=(stride, stride), padding=(1, 1), tilings=tilings)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(
    ("image", "stride", "dilation"), [((7, 7), 1, 1), ((9, 14), 2, 1), ((10, 9), 1, 2), ((11, 12), 2, 3)]
)
def test_activations_in_bfloat16(image: tuple[int, int], stride: int, dilation: int, pairs: bool) -> None:
    """Patterns and anything; in pairs the rows of a kernel fall into pairs and single taps in every way."""
    mask = pattern_mask(9, 7, 0.5, 1, torch.Generator().manual_seed(5))
    mask[4:] |= torch.rand(5, 7, 3, 3, generator=torch.Generator().manual_seed(6)) < 0.4
    own = Tiling((2, 4), (2, 2), code="indexed", sources=3, images=2, pairs=pairs)
    back = Tiling((2 * stride, 4 * stride), (1, 2))
    taps = Tiling((2, 4), (1, 2), pairs=pairs)
    for tilings in (
        dict.fromkeys(PHASES, own),
        {"forward": taps, "dgrad": replace(back, pairs=pairs), "wgrad": taps},
        {"forward": replace(taps, sources=3), "dgrad": replace(back, sources=4, pairs=pairs)},
        {**sweeps((3, 4), (2, 1), (stride, stride), 3, 4), "wgrad": Tiling((2, 4), pairs=pairs)},
    ):
        check(
            mask,
            19,
            image,
            stride=(stride, stride),
            padding=(dilation, dilation),
            dilation=(dilation, dilation),
            bias=True,
            dtype=torch.bfloat16,
            threads=2,
            tilings=tilings,
        )


@pytest.mark.parametrize("image", [(3, 3), (5, 4), (7, 7), (15, 15)], ids=str)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_pairs_of_any_taps(image: tuple[int, int], stride: int, dilation: int) -> None:
    # Patterns of one tap to nine, whose pairs lie side by side, below each other, far apart; at all edges.
    patterns = [(8,), (0, 2), (2, 6), (0, 4, 8), (1, 3, 5, 7), (0, 1, 4, 5), (2, 3, 4, 6, 8), tuple(range(9))]
    mask = torch.zeros(4, len(patterns), 9, dtype=torch.bool)
    for channel, pattern in enumerate(patterns):
        mask[:, channel, list(pattern)] = True
    mask[1:, ::3] = False
    own = Tiling((4, 4), (1, 2), pairs=True)
    tilings = {"forward": own, "dgrad": replace(own, tile=(4 * stride, 4 * stride)), "wgrad": own}
    check(
        mask.view(4, -1, 3, 3),
        17,
        image,
        stride=(stride, stride),
        padding=(dilation, dilation),
        dilation=(dilation, dilation),
        dtype=torch.bfloat16,
        tilings=tilings,
    )


def test_pairs_are_as_many_as_the_rows_of_kernels_allow() -> None:
    mask = torch.zeros(1, 3, 3, 3, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 1, 1, :2] = mask[0, 2, 2, 1:] = mask[0, 2, 0, 0] = mask[0, 2, 0, 2] = True
    tilings = dict.fromkeys(PHASES, Tiling((2, 4), code="indexed", pairs=True))
    problem = ConvProblem.make(3, 1, (3, 3), (5, 5), (1, 1), (1, 1))
    _, tables = prepare(Structure.from_mask(mask), problem, 1, tilings)
    first = tables[2].view(-1, 2)  # of three taps in a row, of two, of two apart, of two
    assert first.tolist() == [[0, 1], [2, 9], [3, 4], [5, 9], [6, 9], [7, 8]]


def test_large_kernel_and_full_density() -> None:
    check(torch.ones(5, 3, 7, 7, dtype=torch.bool), 3, (15, 16), stride=(2, 2), padding=(3, 3), bias=True)
    check(torch.ones(20, 3, 3, 3, dtype=torch.bool), 16, (12, 12), padding=(1, 1))


def test_depthwise_and_same_padding() -> None:
    check(torch.rand(6, 1, 3, 3) < 0.5, 5, (9, 9), padding=(1, 1), groups=6)
    check(torch.rand(6, 4, 5, 3) < 0.5, 5, (9, 9), padding="same")


@pytest.mark.parametrize("channels", [NARROW, NARROW + 1])
def test_more_channels_than_two_bytes_can_tell_apart(channels: int) -> None:
    mask = torch.zeros(2, channels, 1, 1, dtype=torch.bool)
    mask[:, [0, 255, 32768, channels - 1]] = True
    mask[1, 0] = False
    tiling = Tiling((1, 2), (2, 2))
    plan, tables = prepare(
        Structure.from_mask(mask),
        ConvProblem.make(channels, 2, (1, 1), (1, 2)),
        1,
        dict.fromkeys(PHASES, tiling),
    )
    assert plan.tiling("forward").code == "unrolled"
    assert tables[1].itemsize == (2 if channels <= NARROW else 4)
    check(mask, 3, (1, 2), tilings=dict.fromkeys(PHASES, tiling))


def test_no_images_no_weights() -> None:
    mask = torch.zeros(4, 3, 3, 3, dtype=torch.bool)
    check(mask, 5, (6, 6), padding=(1, 1), bias=True)
    structure = Structure.from_mask(torch.ones(4, 3, 3, 3, dtype=torch.bool))
    plan, tables = prepare(structure, ConvProblem.make(3, 4, (3, 3), (6, 6)))
    tools = toolchain()
    assert tools is not None
    x = torch.zeros(0, 3, 6, 6, tools.lanes(torch.float32), requires_grad=True)
    values = torch.ones(4, 27, requires_grad=True)
    y = sparse_conv2d_blocked(x, values, None, list(tables), plan.to_json())
    y.sum().backward()
    assert y.shape[:4] == (0, 4, 4, 4)
    assert values.grad is not None
    assert not values.grad.any()


def test_the_index_has_a_number_for_each_kernel_where_its_weights_follow_each_other() -> None:
    mask = pattern_mask(8, 6, 0.5, 1, torch.Generator().manual_seed(5))
    kernels, weights = int(mask.flatten(2).any(2).sum()), int(mask.sum())
    tilings = sweeps((3, 4), (1, 2), (1, 1), 2, 3)
    _, tables = prepare(Structure.from_mask(mask), ConvProblem.make(6, 8, (3, 3), (9, 9)), 1, tilings)
    assert [tables[i].numel() for i in (2, 5)] == [kernels, kernels]
    mask = torch.ones(8, 6, 3, 3, dtype=torch.bool)
    mask[0, 0, 0, 0] = False  # falls apart into sets that the tap_patterns has
    _, tables = prepare(Structure.from_mask(mask), ConvProblem.make(6, 8, (3, 3), (9, 9)), 1, tilings)
    assert tables[2].numel() <= int(mask.sum())
    check(mask, 5, (9, 9), padding=(1, 1), tilings=tilings)
    assert weights == 4 * kernels
