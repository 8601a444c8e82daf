"""Section 3 of the paper once more in plain loops, and the code against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import when_to_prune_reference as reference
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clicktrain import PaT
from clicktrain.methods import Pruner
from clicktrain.sparsity.channel_importance import (
    count_gone,
    filter_magnitude,
    filter_taylor,
    prunable_channels,
    rank_channels,
)
from clicktrain.sparsity.triggers import History, early_pruning_indicator, when_stable

PER_EPOCH = 4


def lists(parts: list[torch.Tensor]) -> reference.Filters:
    return [part.double().tolist() for part in parts]


@pytest.mark.parametrize("layers", [1, 3])
def test_scores_are_those_of_the_equations(layers: int) -> None:
    filters = [torch.randn(5, 4 + 3 * i) for i in range(layers)]
    grads = [torch.randn_like(part) for part in filters]
    expected = reference.magnitude(lists(filters))
    torch.testing.assert_close(filter_magnitude(filters).tolist(), expected, rtol=1e-5, atol=1e-6)
    expected = reference.taylor(lists(filters), lists(grads))
    torch.testing.assert_close(filter_taylor(filters, grads).tolist(), expected, rtol=1e-4, atol=1e-5)


NETWORKS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=7), min_size=1, max_size=5)


@given(values=NETWORKS, data=st.data(), least=st.integers(1, 3))
def test_ranking_is_that_of_one_neuron_at_a_time(
    values: list[list[int]], data: st.DataObject, least: int
) -> None:
    scores = {f"g{i}": torch.tensor(group).float() for i, group in enumerate(values)}
    of_each = st.lists(st.integers(1, 4), min_size=len(values), max_size=len(values))
    filters = data.draw(st.none() | of_each.map(lambda counts: dict(zip(scores, counts, strict=True))))
    most = prunable_channels({name: len(score) for name, score in scores.items()}, least, filters)
    total = data.draw(st.integers(0, most))
    masks = rank_channels(scores, total, least, weights=filters)
    expected = reference.prune(
        {name: score.tolist() for name, score in scores.items()}, total, least, filters
    )
    assert {name: mask.tolist() for name, mask in masks.items()} == expected
    first = data.draw(st.integers(0, total))
    before = rank_channels(scores, first, least, weights=filters)
    again = rank_channels(scores, max(total, count_gone(before, filters)), least, before, filters)
    assert all(torch.equal(again[name], masks[name]) for name in masks), "in two steps as in one"
    with pytest.raises(ValueError, match="cannot be pruned"):
        rank_channels(scores, most + 1, least, weights=filters)


@given(
    structures=st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=3), min_size=2, max_size=9),
    window=st.integers(1, 8),
)
def test_against_plain_loops(structures: list[list[int]], window: int) -> None:
    value = early_pruning_indicator(structures, window)
    if len(structures) <= window:
        assert value is None
    else:
        assert value == pytest.approx(reference.epi(structures, window))
        assert 0 <= value <= 1


@given(
    st.lists(st.one_of(st.none(), st.sampled_from([0.5, 0.9, 0.95, 0.99, 1.0])), max_size=12),
    st.integers(0, 5),
)
def test_fires_when_algorithm_2_does(values: list[float | None], needed: int) -> None:
    seen = (
        History(t, 90, indicators=values[: t + 1], threshold=0.94, compared=needed)
        for t in range(len(values))
    )
    fired = next((t for t, history in enumerate(seen) if when_stable(history)), None)
    assert fired == reference.epoch_that_prunes(values, 0.94, needed)


class Block(nn.Module):
    """A stem and a residual branch: the outputs of ``stem`` and ``second`` can only go together."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=not norm)
        self.bn = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.first = nn.Conv2d(6, 10, 3, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(10) if norm else nn.Identity()
        self.second = nn.Conv2d(10, 6, 3, padding=1, bias=not norm)
        self.bn2 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.bn2(self.second(F.relu(self.bn1(self.first(x))))))
        return self.head(x.mean(dim=(2, 3)))


STAGE, INSIDE = "stem.weight:0", "first.weight:0"


def gradients(pruner: Pruner, number: int) -> None:
    """Backward pass of batch ``number``."""
    generator = torch.Generator().manual_seed(number)
    y = torch.randint(0, 4, (8,), generator=generator)
    x = torch.randn(8, 3, 6, 6, generator=generator) + y.view(8, 1, 1, 1) * 0.5
    loss = F.cross_entropy(pruner.model(x), y)
    loss.backward()
    pruner.observe(loss)


def rows(weight: Tensor) -> list[list[float]]:
    return weight.detach().double().view(len(weight), -1).tolist()


def literal_scores(pruner: Pruner, criterion: str) -> dict[str, list[float]]:
    """Of the gradients that the parameters hold now."""
    m: Any = pruner.model
    if criterion == "magnitude":
        pairs = {STAGE: [m.stem, m.second], INSIDE: [m.first]}
        return {
            name: reference.magnitude([rows(layer.weight) for layer in layers])
            for name, layers in pairs.items()
        }
    norms = {STAGE: [m.bn, m.bn2], INSIDE: [m.bn1]}
    convs = {STAGE: [m.stem, m.second], INSIDE: [m.first]}
    parameters = {
        name: [p for layer in layers for p in (layer.weight, layer.bias)] for name, layers in norms.items()
    }
    if criterion == "taylor_weights":
        parameters = {name: [layer.weight for layer in layers] for name, layers in convs.items()}
    return {
        name: reference.taylor([rows(p) for p in own], [rows(p.grad) for p in own])
        for name, own in parameters.items()
    }


@pytest.mark.parametrize("criterion", ["taylor", "magnitude", "taylor_weights"])
def test_epi_and_structures_are_those_of_plain_loops(criterion: Any) -> None:
    ratio = 0.45
    method = PaT(prune_ratio=ratio, criterion=criterion, policy="epoch", prune_epoch=5, epi_window=2)
    torch.manual_seed(0)
    model = Block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    pruner = method.attach(
        model, optimizer, epochs=6, steps_per_epoch=PER_EPOCH, example=torch.zeros(1, 3, 6, 6)
    )
    structures: list[list[int]] = []
    for epoch in range(5):
        sums: dict[str, list[float]] = {}
        for number in range(epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH):
            gradients(pruner, number)
            for name, score in literal_scores(pruner, criterion).items():
                sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * len(score)), score, strict=True)]
            pruner.optimizer.step()
            pruner.optimizer.zero_grad()
            if number % PER_EPOCH == 2:
                for name, score in sums.items():
                    found = pruner._state.pruning.scores.sums[name].double()
                    torch.testing.assert_close(found, torch.tensor(score).double(), rtol=1e-3, atol=1e-6)
        kept = reference.prune(sums, round(ratio * 22), 1, {STAGE: 2, INSIDE: 1})
        structures.append([sum(kept[name]) for name in (STAGE, INSIDE)])
        event = [event for event in pruner.events if event["event"] == "epi"][-1]
        assert event["epoch"] == epoch + 1
        assert event["structure"] == dict(zip((STAGE, INSIDE), structures[-1], strict=True))
        expected = reference.epi(structures, 2) if epoch >= 2 else None
        assert event["epi"] == (None if expected is None else pytest.approx(expected))
    assert pruner.stage == "prune"
