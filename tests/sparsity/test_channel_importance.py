"""Scores of neurons and their global ranking, against plain loops (When to Prune?, section 3.1)."""

from __future__ import annotations

import math

import pytest
import torch

from clicktrain.methods.channels.criteria import ChannelScores
from clicktrain.sparsity.channel_importance import (
    batch_norm_taylor,
    rank_channels,
    round_widths,
)
from clicktrain.sparsity.schedules import exponential_steps
from clicktrain.surgery.neurons import NeuronGroup


def test_scale_and_shift_by_hand() -> None:
    gamma, beta = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [-1.0]])
    score = batch_norm_taylor([gamma], [torch.tensor([[3.0], [1.0]])], [beta], [torch.tensor([[2.0], [2.0]])])
    assert score.tolist() == [4.0, 0.0]
    coupled = batch_norm_taylor([gamma, gamma], [gamma, -gamma], [beta, beta], [beta, beta])
    assert coupled.tolist() == [0.5, 2.0], "what the loss does when both go"


def test_scores_add_up_over_batches() -> None:
    a, b = NeuronGroup("a", (), 2, (), (), ()), NeuronGroup("b", (), 1, (), (), ())
    scores = ChannelScores()
    for batch in ({"a": [1.0, 2.0]}, {"a": [1.0, 1.0], "b": [5.0]}):
        now = {name: torch.tensor(values) for name, values in batch.items()}
        scores.add([a, b], lambda values, now=now: now.get(values.group.name), {}, lambda _: None)
    means = scores.means([a, b], {})
    assert {name: mean.tolist() for name, mean in means.items()} == {"a": [1.0, 1.5], "b": [5.0]}


def test_what_is_pruned_stays_pruned_although_it_scores_high() -> None:
    scores = {"a": torch.tensor([9.0, 1.0, 5.0])}
    masks = rank_channels(scores, 2, kept={"a": torch.tensor([False, True, True])})
    assert masks["a"].tolist() == [False, False, True]
    with pytest.raises(ValueError, match="1 are"):
        rank_channels(scores, 0, kept={"a": torch.tensor([False, True, True])})


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.77, 0.9])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_the_pruned_count_is_exact_at_every_ratio(ratio: float, steps: int) -> None:
    sizes = (16, 16, 32, 64, 7)
    total = sum(sizes)
    left = total - round(ratio * total)
    kept = None
    for remaining in exponential_steps(total, left, steps):
        scores = {str(i): torch.rand(size) for i, size in enumerate(sizes)}
        kept = rank_channels(scores, total - round(remaining), kept=kept)
    assert kept is not None
    assert sum(int(mask.sum()) for mask in kept.values()) == left
    assert all(mask.any() for mask in kept.values())


def test_exponential_schedule_has_its_end_points_and_keeps_one_share() -> None:
    left = exponential_steps(1000, 125, 6)
    assert len(left) == 6
    assert left[-1] == 125
    shares = [after / before for before, after in zip([1000, *left], left, strict=False)]
    assert shares == pytest.approx([math.sqrt(0.5)] * 6)
    steps = [before - after for before, after in zip([1000, *left], left, strict=False)]
    assert steps == sorted(steps, reverse=True)
    assert exponential_steps(10, 10, 3) == [10, 10, 10]
    assert exponential_steps(10, 3, 1) == [3]
    for wrong in ((0, 0, 1), (10, 11, 1), (10, 5, 0)):
        with pytest.raises(ValueError, match="exponential"):
            exponential_steps(*wrong)


def test_widths_become_the_nearest_multiples_in_the_order_of_rank() -> None:
    scores = {"a": torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 6.0, 0.0, 7.0]), "b": torch.tensor([1.0, 2.0])}
    half = rank_channels(scores, 3)
    assert half["a"].tolist() == [True, False, True, True, True, True, False, True]
    assert round_widths(half, scores, 4)["a"].all(), "half way between 4 and 8: more stay"
    masks = rank_channels(scores, 4)
    assert masks["a"].tolist() == [True, False, True, False, True, True, False, True]
    rounded = round_widths(masks, scores, 4)
    assert rounded["a"].tolist() == [True, False, True, False, False, True, False, True]
    assert rounded["b"].all(), "no multiple fits into two neurons"
    up = round_widths({"a": masks["a"] & (scores["a"] > 4.5), "b": masks["b"]}, scores, 4)
    assert up["a"].tolist() == [True, False, True, False, False, True, False, True]
    same = round_widths(masks, scores, 1)
    assert all(torch.equal(same[name], masks[name]) for name in masks)
