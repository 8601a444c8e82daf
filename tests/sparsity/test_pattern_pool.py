"""Candidate patterns and competitive scores: what holds for any input (the oracle is in tests/papers)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clicktrain.sparsity.pattern_pool import PatternVotes, add_votes, candidate_patterns, select_pool
from clicktrain.sparsity.patterns import Pattern, neighbor_table

CHECK = settings(max_examples=100)
SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7))


@CHECK
@given(SHAPES, st.integers(1, 49), st.integers(0, 10_000))
def test_candidates_have_the_entries_hold_the_maximum_and_hang_together(
    shape: tuple[int, int], entries: int, seed: int
) -> None:
    entries = min(entries, shape[0] * shape[1])
    importance = torch.rand(2, 3, *shape, generator=torch.Generator().manual_seed(seed))
    near = neighbor_table(shape, True)
    for bits, kernel in zip(
        candidate_patterns(importance, entries).flatten().tolist(), importance.flatten(0, 1), strict=True
    ):
        kept = Pattern(bits, shape).mask().flatten()
        assert int(kept.sum()) == entries
        assert kept[kernel.argmax()]
        reached = torch.zeros_like(kept)
        reached[kernel.argmax()] = True
        for _ in range(entries):
            reached |= kept & (near[reached].any(dim=0))
        assert torch.equal(reached, kept)


@CHECK
@given(st.integers(0, 10_000))
def test_candidates_do_not_depend_on_scale_or_on_other_kernels(seed: int) -> None:
    importance = torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
    whole = candidate_patterns(importance, 4)
    assert torch.equal(candidate_patterns(importance * 2.0**-40, 4), whole)
    assert torch.equal(candidate_patterns(importance[1:2, 2:], 4), whole[1:2, 2:])
    assert torch.equal(candidate_patterns(importance.to(memory_format=torch.channels_last), 4), whole)


@pytest.mark.parametrize("entries", [0, 10])
def test_impossible_entries_are_refused(entries: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.9"):
        candidate_patterns(torch.ones(1, 1, 3, 3), entries)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, float("inf"), float("nan"), -float("nan")], ids=str)
@pytest.mark.parametrize("everywhere", [True, False])
def test_overflow_and_invalid_numbers_still_give_a_pattern(value: float, everywhere: bool) -> None:
    importance = torch.ones(1, 1, 3, 3)
    importance.view(-1)[slice(None) if everywhere else slice(0, 1)] = value
    for entries in range(1, 9):
        assert Pattern(candidate_patterns(importance, entries).item()).entries == entries


@pytest.mark.parametrize("shape", [(3, 3), (5, 5)], ids=str)
def test_votes_do_not_depend_on_the_order_of_batches(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        candidate_patterns(torch.randint(0, 3, (4, 5, *shape), generator=generator).float(), 3)
        for _ in range(3)
    ]
    forward, backward = PatternVotes.empty(), PatternVotes.empty()
    for bits in batches:
        forward = add_votes(forward, bits, shape)
    for bits in reversed(batches):
        backward = add_votes(backward, bits, shape)
    assert torch.equal(forward.bits, backward.bits)
    assert torch.equal(forward.counts, backward.counts)
    assert int(forward.counts.sum()) == 3 * 4 * 5
    assert (forward.bits.diff() > 0).all()


def test_pool_ties_go_to_the_lowest_bits_and_a_short_list_gives_a_small_pool() -> None:
    votes = PatternVotes(torch.tensor([3, 5, 6, 9]), torch.tensor([2, 7, 7, 2]))
    assert [pattern.bits for pattern in select_pool(votes, 3, (2, 2)).patterns] == [5, 6, 3]
    assert len(select_pool(votes, 12, (2, 2))) == 4
