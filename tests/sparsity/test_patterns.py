"""Pattern, PatternPool, fixed pools and neighbourhoods."""

from __future__ import annotations

import math

import pytest
import torch

from clicktrain.errors import UserError
from clicktrain.sparsity.patterns import (
    Pattern,
    PatternPool,
    all_patterns,
    default_entries,
    fixed_pool,
    neighbor_table,
)


def test_bit_r_times_s_plus_s_is_position_r_s() -> None:
    pattern = Pattern(0b100_001, shape=(2, 3))
    assert pattern.entries == 2
    assert pattern.mask().tolist() == [[True, False, False], [False, False, True]]
    assert str(pattern) == "#../..#"


@pytest.mark.parametrize(("bits", "shape"), [(0, (3, 3)), (512, (3, 3)), (-1, (3, 3)), (1, (8, 8))])
def test_impossible_patterns_are_refused(bits: int, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="pattern"):
        Pattern(bits, shape)


def test_the_patterns_of_a_pool_agree() -> None:
    with pytest.raises(ValueError, match="at least one"):
        PatternPool(())
    with pytest.raises(ValueError, match="agree"):
        PatternPool.from_bits([0b11, 0b111], (3, 3))
    with pytest.raises(ValueError, match="agree"):
        PatternPool((Pattern(1, (1, 1)), Pattern(1, (1, 2))))


@pytest.mark.parametrize(
    ("entries", "shape"), [(1, (1, 1)), (4, (3, 3)), (2, (1, 5)), (9, (3, 3)), (3, (7, 7))]
)
def test_all_patterns_is_every_choice_once(entries: int, shape: tuple[int, int]) -> None:
    patterns = all_patterns(entries, shape)
    assert len(set(patterns)) == len(patterns) == math.comb(shape[0] * shape[1], entries)
    assert {pattern.entries for pattern in patterns} == {entries}
    if len(patterns) < 200:
        pool = PatternPool(patterns)
        assert (len(pool), pool.shape, pool.entries) == (len(patterns), shape, entries)
        assert pool.masks().sum(dim=(1, 2)).tolist() == [entries] * len(patterns)


@pytest.mark.parametrize("size", [4, 8, 12, 16])
def test_fixed_pools_are_nested_distinct_and_contain_the_centre(size: int) -> None:
    pool = fixed_pool(size)
    assert len(set(pool.patterns)) == size
    assert pool.entries == 4
    assert pool.masks()[:, 1, 1].all()
    assert pool.patterns == fixed_pool(16).patterns[:size]


def test_other_fixed_pools_are_refused() -> None:
    with pytest.raises(UserError, match="4, 8, 12 or 16"):
        fixed_pool(5)


@pytest.mark.parametrize(
    ("shape", "expected"), [((3, 3), 4), ((1, 1), 1), ((1, 3), 1), ((5, 5), 11), ((7, 7), 22), ((2, 2), 2)]
)
def test_other_kernel_sizes_keep_the_density_of_4_of_9(shape: tuple[int, int], expected: int) -> None:
    assert default_entries(shape, 4) == expected


def test_default_entries_stay_inside_the_kernel() -> None:
    assert default_entries((3, 3), 12) == 9
    assert default_entries((1, 1), 1) == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 3), (4, 2)], ids=str)
@pytest.mark.parametrize("diagonal", [True, False])
def test_neighbours_are_one_step_away(shape: tuple[int, int], diagonal: bool) -> None:
    table = neighbor_table(shape, diagonal)
    places = [(r, s) for r in range(shape[0]) for s in range(shape[1])]
    for i, (r, s) in enumerate(places):
        for j, (p, q) in enumerate(places):
            steps = (abs(r - p), abs(s - q))
            near = max(steps) == 1 if diagonal else sum(steps) == 1
            assert bool(table[i, j]) == near
    assert torch.equal(table, table.T)
