"""The early pruning indicator on structures worked out by hand, and against plain loops (section 3.3)."""

from __future__ import annotations

import pytest
import torch

from clicktrain.sparsity.triggers import (
    GRADIENT_THRESHOLD,
    MAGNITUDE_THRESHOLD,
    History,
    early_pruning_indicator,
    kept_kernels,
    layer_distance,
    structure_similarity,
    when_stable,
)


def test_by_hand() -> None:
    assert layer_distance(3, 1) == 0.5
    assert layer_distance(0, 7) == 1.0
    assert layer_distance(0, 0) == 0.0
    assert structure_similarity([3, 8], [1, 8]) == 0.75
    assert structure_similarity([4, 4], [4, 4]) == 1.0
    # Figure 2: b and c are more alike than a and b, with as many neurons each.
    a, b, c = [2, 4, 1], [4, 2, 1], [3, 2, 2]
    assert structure_similarity(b, c) > structure_similarity(a, b)
    assert early_pruning_indicator([[3, 1], [1, 3]], 1) == 0.5
    assert early_pruning_indicator([[3, 1], [1, 3], [1, 3]], 2) == 0.75
    assert early_pruning_indicator([[3, 1], [1, 3]], 2) is None
    assert early_pruning_indicator([], 1) is None
    with pytest.raises(ValueError, match="compared"):
        structure_similarity([1], [1, 2])


def test_says_why_and_does_not_fire_on_a_fall() -> None:
    assert (GRADIENT_THRESHOLD, MAGNITUDE_THRESHOLD) == (0.944, 0.983)

    def trigger(indicators: list[float | None]) -> str | None:
        return when_stable(History(len(indicators), 90, indicators=indicators))

    assert trigger([None, 0.9, 0.985]) == "the structure is stable: EPI 0.985 is not under 0.983"
    assert trigger([0.99, 0.985]) is None, "lower than one of the last five"
    assert trigger([0.99, 0.1, 0.1, 0.1, 0.1, 0.1, 0.985]) is not None, "six epochs ago"
    assert trigger([]) is None


def test_structure_of_kernels_over_all_layers() -> None:
    scores = {"a": torch.tensor([[1.0, 5.0], [2.0, 2.0]]), "b": torch.tensor([[9.0], [2.0]])}
    assert kept_kernels(scores, 0.5) == [2, 1]
    assert kept_kernels(scores, 1.0) == [4, 2]
    assert kept_kernels(scores, 0.01) == [0, 1], "the best one stays"
