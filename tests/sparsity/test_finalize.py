"""Votes, the loss margin, kernels and masks, by hand (the oracle is in tests/papers)."""

from __future__ import annotations

import pytest
import torch

from clicktrain.sparsity.finalize import (
    add_pattern_votes_,
    batch_counts,
    best_patterns,
    chosen_scores,
    keep_kernels,
    keep_kernels_alike,
    pattern_mask,
    similar_filters,
)
from clicktrain.sparsity.patterns import PatternPool

POOL = PatternPool.from_bits([0b011, 0b110], (1, 3)).masks()
IMPORTANCE = torch.tensor([[[[4.0, 1.0, 2.0]], [[0.0, 1.0, 5.0]], [[1.0, 1.0, 1.0]]]])


def test_a_kernel_votes_for_its_best_pattern_and_ties_go_to_the_first() -> None:
    assert best_patterns(IMPORTANCE, POOL).tolist() == [[0, 1, 0]]
    counts = torch.zeros(1, 3, 2, dtype=torch.int32)
    add_pattern_votes_(counts, IMPORTANCE, POOL, torch.tensor(1.0))
    add_pattern_votes_(counts, IMPORTANCE, POOL, torch.tensor(0.0))
    add_pattern_votes_(counts, IMPORTANCE.flip(3), POOL, torch.tensor(1.0))
    assert counts.tolist() == [[[1, 1], [1, 1], [2, 0]]]


def test_the_first_batch_counts_and_an_unknown_rule_is_refused() -> None:
    loss = torch.tensor(3.0)
    assert batch_counts(None, loss, 0.0018, "ratio").item() == 1
    assert batch_counts(None, loss, 0.0018, "increase").item() == 1
    with pytest.raises(ValueError, match="ratio"):
        batch_counts(loss, loss, 0.0018, "other")


@pytest.mark.parametrize(
    ("rule", "previous", "current", "counts"),
    [
        ("ratio", 1.0, 555.0, 1),
        ("ratio", 1.0, 556.0, 0),
        ("ratio", 1.0, 0.0, 1),
        ("increase", 1.0, 1.001, 1),
        ("increase", 1.0, 1.002, 0),
        ("increase", 1.0, 0.1, 1),
    ],
)
def test_loss_margin_of_the_paper(rule: str, previous: float, current: float, counts: int) -> None:
    assert batch_counts(torch.tensor(previous), torch.tensor(current), 0.0018, rule).item() == counts


def test_kernels_with_equal_scores_are_kept_from_the_first_on() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert keep_kernels(scores, 2).tolist() == [[False, True, True, False], [True, True, False, False]]
    assert not keep_kernels(scores, 0).any()
    assert keep_kernels(scores, 4).all()


def test_mask_and_scores_of_chosen_patterns() -> None:
    pattern_id = torch.tensor([[0, 1, 1]])
    assert chosen_scores(IMPORTANCE, POOL, pattern_id).tolist() == [[5.0, 6.0, 2.0]]
    kept = torch.tensor([[True, False, True]])
    mask = pattern_mask(pattern_id, kept, POOL, group=2)
    one = [[[True, True, False]], [[False] * 3], [[False, True, True]]]
    assert mask.tolist() == [one, one]


def literal_order(scores: list[list[float]], kernels: int, group: int) -> list[int]:
    """`similar_filters` in plain loops."""
    wants = []
    for row in scores:
        best = sorted(range(len(row)), key=lambda c: (-row[c], c))[:kernels]
        kept = [value if c in best else 0.0 for c, value in enumerate(row)]
        norm = sum(value * value for value in kept) ** 0.5
        wants.append([value / norm if norm else 0.0 for value in kept])
    left, order = list(range(len(scores))), []
    while left:
        begins = max(left, key=lambda f: (sum(scores[f]), -f))
        left.remove(begins)
        near = sorted(
            left, key=lambda f: (-sum(a * b for a, b in zip(wants[begins], wants[f], strict=True)), f)
        )
        order += [begins, *near[: group - 1]]
        left = [f for f in left if f not in near[: group - 1]]
    return order


@pytest.mark.parametrize("seed", range(4))
def test_similar_filters_are_those_of_plain_loops(seed: int) -> None:
    scores = torch.rand(12, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for kernels, group in ((3, 4), (1, 2), (7, 3), (2, 12)):
        order = similar_filters(scores, kernels, group).tolist()
        assert sorted(order) == list(range(12))
        assert order == literal_order(scores.tolist(), kernels, group)


def test_filters_of_a_group_keep_the_same_channels_and_similar_ones_lose_less() -> None:
    torch.manual_seed(0)
    scores = torch.rand(8, 6) * 0.1
    scores[::2, :3] += 1  # every other filter wants the first half of the channels
    scores[1::2, 3:] += 1
    sums = {}
    for similar in (False, True):
        kept = keep_kernels_alike(scores, 3, 4, similar)
        assert kept.sum(1).tolist() == [3] * 8
        assert len({tuple(row) for row in kept.tolist()}) <= 2
        sums[similar] = float((scores * kept).sum())
    wanted = [[f % 2 == c // 3 for c in range(6)] for f in range(8)]
    assert keep_kernels_alike(scores, 3, 4, True).tolist() == wanted
    assert sums[True] > 1.3 * sums[False]
    neighbors = keep_kernels_alike(scores, 2, 2, False)
    for first in range(0, 8, 2):
        expected = keep_kernels(scores[first : first + 2].sum(0, keepdim=True), 2)
        assert torch.equal(neighbors[first : first + 2], expected.expand(2, -1))
