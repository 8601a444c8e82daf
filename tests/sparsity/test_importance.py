"""Criteria and sums of scores."""

from __future__ import annotations

import pytest
import torch

from clicktrain.sparsity.importance import CRITERIA, group_sum, kernel_scores, pattern_scores
from clicktrain.sparsity.patterns import PatternPool

WEIGHT = torch.tensor([[[[-2.0, 3.0]]]])
GRAD = torch.tensor([[[[5.0, -0.5]]]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("taylor", [100.0, 2.25]), ("magnitude", [4.0, 9.0]), ("mixed", [20.0, 4.5])],
)
def test_criteria_by_hand(name: str, expected: list[float]) -> None:
    assert CRITERIA[name](WEIGHT, GRAD).flatten().tolist() == expected


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_criteria_ignore_signs_and_change_nothing(name: str) -> None:
    weight, grad = torch.randn(2, 3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    before = weight.clone(), grad.clone()
    scores = CRITERIA[name](weight, grad)
    assert scores.shape == weight.shape
    assert (scores >= 0).all()
    torch.testing.assert_close(CRITERIA[name](-weight, grad), scores)
    torch.testing.assert_close(CRITERIA[name](weight, -grad), scores)
    assert torch.equal(weight, before[0])
    assert torch.equal(grad, before[1])


def test_patterns_and_kernels_sum_their_weights() -> None:
    importance = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]], [[0.0, 1.0], [0.0, 0.0]]]])
    pool = PatternPool.from_bits([0b0011, 0b1010], (2, 2))
    assert pattern_scores(importance, pool.masks()).tolist() == [[[3.0, 10.0], [1.0, 1.0]]]
    assert kernel_scores(importance).tolist() == [[15.0, 1.0]]


def test_groups_are_neighbouring_filters() -> None:
    importance = torch.arange(8.0).view(4, 2, 1, 1)
    assert group_sum(importance, 1) is importance
    assert group_sum(importance, 2).flatten().tolist() == [2.0, 4.0, 10.0, 12.0]
    assert group_sum(importance, 4).flatten().tolist() == [12.0, 16.0]
    with pytest.raises(RuntimeError):
        group_sum(importance, 3)
