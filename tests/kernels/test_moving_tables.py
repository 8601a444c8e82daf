"""Tables that are made again when masks move: those made from scratch, and kernels that compute with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import slow_tables as slow
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from slow_layout import block, unblock
from torch import Tensor

from clicktrain.formats.packed import Structure, pack_values
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.sparse_conv2d.blocked import launch
from clicktrain.kernels.sparse_conv2d.blocked.ops import sparse_conv2d_blocked
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tables import Parts
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import MAX_TAPS, choose, is_complete
from clicktrain.kernels.sparse_conv2d.blocked.prepared import prepare, variants
from clicktrain.kernels.sparse_conv2d.blocked.problem import PHASES, ConvProblem, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.shared.orders import order_by, starts_of

KINDS = ("weight", "kernel", "pattern")


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.integers(1, 2))
    kernel = draw(st.sampled_from([(3, 3), (1, 1), (2, 2), (1, 3), (5, 5), (8, 8)]))
    shape = groups * draw(st.integers(1, 5)), draw(st.integers(1, 5)), *kernel
    return {
        "kind": draw(st.sampled_from(KINDS)),
        "shape": shape,
        "groups": groups,
        "density": draw(st.sampled_from([0.0, 0.2, 0.6, 1.0])),
        "seed": draw(st.integers(0, 99)),
    }


@given(layer=layers(), moving=st.booleans(), block=st.integers(1, 6))
@settings(max_examples=100)
def test_tables_are_those_of_plain_loops(layer: dict[str, Any], moving: bool, block: int) -> None:
    kind, shape, groups = layer["kind"], layer["shape"], layer["groups"]
    mask = slow.random_mask(kind, shape, layer["density"], layer["seed"])
    structure = Structure.from_mask(mask, slow.patterns_of(kind, *shape[2:]) if moving else None)
    taps = choose(structure)
    found, every = Parts(structure, taps, groups), slow.parts(mask, taps, groups)
    filters, channels = shape[0], shape[1] * groups
    for table, backward, count in (
        (found.by_filter(1), False, filters),
        (found.by_channel(), True, channels),
    ):
        rows, entries, order = slow.by_result(every, backward, count)
        assert table.rows.tolist() == rows
        assert table.entries.tolist() == entries
        assert table.order.tolist() == order
    wgrad = found.by_kernel(1, block)
    rows, entries, order = slow.by_kernel(every, filters, channels, block)
    assert wgrad.rows.tolist() == rows
    assert wgrad.entries.tolist() == entries
    assert wgrad.order.tolist() == order


@given(keys=st.lists(st.tuples(st.integers(0, 70000), st.integers(0, 2), st.integers(0, 300)), max_size=40))
def test_orders_are_stable_sorts(keys: list[tuple[int, int, int]]) -> None:
    numbers = torch.tensor(keys, dtype=torch.int64).view(-1, 3).numpy()
    bounds = (70001, 3, 301)
    order = order_by(*((numbers[:, i], bound) for i, bound in enumerate(bounds)))
    assert order.tolist() == sorted(range(len(keys)), key=lambda i: keys[i])
    starts = starts_of(numbers[order, 1][:0], 3)
    assert starts.tolist() == [0, 0, 0, 0]


@pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")
@given(layer=layers(), seed=st.integers(100, 199), count=st.sampled_from([0.1, 0.5, 1.0]))
@settings(max_examples=20)
def test_another_mask_needs_no_other_code(layer: dict[str, Any], seed: int, count: float) -> None:
    """The plan stays, whatever its tilings; for masks of its kind, with more or fewer weights."""
    kind, shape, groups = layer["kind"], layer["shape"], layer["groups"]
    patterns = slow.patterns_of(kind, *shape[2:])
    first = Structure.from_mask(slow.random_mask(kind, shape, layer["density"], layer["seed"]), patterns)
    then = Structure.from_mask(slow.random_mask(kind, shape, count, seed), patterns)
    problem = ConvProblem.make(shape[1] * groups, shape[0], shape[2:], (9, 8), (1, 1), (1, 1))
    assert choose(first) == choose(then)
    small = bool(patterns) and max(map(len, patterns)) <= MAX_TAPS
    assert is_complete(first, choose(first)) == (small or shape[2:] == (1, 1))
    found = variants(first, problem, groups)
    assert [one.plan for one in found] == [one.plan for one in variants(then, problem, groups)]
    assert all(one.tiling.filters_per_tile == 1 for one in found)
    plan, _ = prepare(first, problem, groups)
    assert prepare(then, problem, groups, dict(plan.tilings))[0] == plan


def moved_convolution(
    kind: str,
    shape: tuple[int, int, int, int],
    image: tuple[int, int],
    *,
    stride: int = 1,
    groups: int = 1,
    code: str | None = None,
    threads: int = 1,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Kernels made for one mask compute with the tables of others; all gradients against float64."""
    tools = toolchain()
    assert tools is not None
    patterns = slow.patterns_of(kind, *shape[2:])
    problem = ConvProblem.make(shape[1] * groups, shape[0], shape[2:], image, (stride, stride), (1, 1))
    tilings: dict[Any, Tiling] = {}
    plan = None
    torch.set_num_threads(threads)
    try:
        for seed, density in enumerate((0.3, 0.3, 0.6, 0.05)):
            mask = slow.random_mask(kind, shape, density, seed)
            structure = Structure.from_mask(mask, patterns)
            if plan is None:
                found = variants(structure, problem, groups, dtype)
                wanted = {one.phase: one.tiling for one in found if code is None or one.tiling.code == code}
                tilings = {phase: replace(tiling, pairs=False) for phase, tiling in wanted.items()}
            now, tables = prepare(structure, problem, groups, tilings)
            assert plan in (None, now)
            plan = now
            compute(mask, structure, plan.to_json(), list(tables), problem, stride, groups, dtype)
    finally:
        torch.set_num_threads(1)


def compute(
    mask: Tensor,
    structure: Structure,
    plan: str,
    tables: list[Tensor],
    problem: ConvProblem,
    stride: int,
    groups: int,
    dtype: torch.dtype,
) -> None:
    tools = toolchain()
    assert tools is not None
    generator = torch.Generator().manual_seed(1)
    lanes = tools.lanes(dtype)
    x = torch.randn(
        5, problem.channels, problem.rows.size, problem.columns.size, generator=generator
    ).double()
    weight = torch.randn(mask.shape, generator=generator).double() * mask
    x.requires_grad_()
    weight.requires_grad_()
    want = F.conv2d(x, weight, None, stride, 1, 1, groups)
    gy = torch.randn(want.shape, generator=generator).double()
    want.backward(gy)
    assert x.grad is not None
    assert weight.grad is not None
    own = x.detach().to(dtype).requires_grad_()
    values = pack_values(structure, weight.detach()).to(dtype).requires_grad_()
    y = unblock(sparse_conv2d_blocked(block(own, lanes), values, None, tables, plan), 5)
    y.backward(gy.to(dtype))
    tolerance = 1e-11 if dtype is torch.float64 else 1e-4
    pairs = ((y, want), (own.grad, x.grad), (values.grad, pack_values(structure, weight.grad)))
    for mine, expected in pairs:
        assert mine is not None
        assert torch.allclose(mine.double(), expected, rtol=tolerance, atol=tolerance)


CASES: list[dict[str, Any]] = [
    {"kind": "weight", "shape": (7, 5, 3, 3), "image": (6, 9)},
    {"kind": "weight", "shape": (6, 3, 3, 3), "image": (7, 7), "stride": 2, "groups": 2, "threads": 2},
    {"kind": "kernel", "shape": (9, 6, 3, 3), "image": (8, 5), "threads": 2},
    {"kind": "kernel", "shape": (4, 9, 1, 1), "image": (3, 3)},
    {"kind": "pattern", "shape": (8, 7, 3, 3), "image": (5, 6)},
    {"kind": "pattern", "shape": (16, 33, 3, 3), "image": (16, 16), "code": "cache_blocked"},
    {"kind": "kernel", "shape": (5, 7, 3, 3), "image": (6, 6), "code": "indexed"},
    {"kind": "weight", "shape": (5, 7, 3, 3), "image": (6, 6), "code": "unrolled", "dtype": torch.float32},
]


@pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_kernels_compute_with_the_tables_of_masks_that_moved(case: dict[str, Any]) -> None:
    moved_convolution(**case)


def test_a_pattern_that_was_not_named_is_refused() -> None:
    mask = torch.zeros(2, 2, 3, 3, dtype=torch.bool)
    mask[0, 0, 1, 1] = True
    structure = Structure.from_mask(mask, ((0, 1, 2),))
    with pytest.raises(ValueError, match=r"no code for the taps \[4\]"):
        Parts(structure, choose(structure))


def test_phases_and_code() -> None:
    """Moving single weights get indexed code, or that of single taps; whole kernels their pattern."""
    if toolchain() is None:
        pytest.skip("there is no C compiler")
    problem = ConvProblem.make(8, 8, (3, 3), (8, 8), (1, 1), (1, 1))
    weight, kernel = (
        Structure.from_mask(slow.random_mask(kind, (8, 8, 3, 3), 0.3, 0), slow.patterns_of(kind, 3, 3))
        for kind in ("weight", "kernel")
    )
    plan, _ = prepare(weight, problem)
    assert {plan.tiling(phase).code for phase in PHASES} == {"indexed"}
    assert plan.tap_patterns == tuple((tap,) for tap in range(9))
    assert prepare(kernel, problem)[0].tap_patterns == (tuple(range(9)),)
    assert launch.compile_plan(plan.to_json(), torch.float32)
