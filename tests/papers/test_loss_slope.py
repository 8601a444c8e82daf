"""When ClickTrain prunes: the loss slope of section 4.1 and Figure 5, the hard prune of Table 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import clicktrain_reference as reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_curves import (
    CIFAR10_RESNET110,
    CIFAR10_VGG19,
    CIFAR_BATCHES,
    IMAGENET_BATCHES,
    IMAGENET_RESNET18,
)
from torch import nn

from clicktrain import ClickTrain
from clicktrain.sparsity.triggers import History, LossSlope, when_loss_settles


def settles_after(losses: Sequence[float], batches: int, slope: LossSlope) -> int | None:
    """Finished epochs when the trigger fires first."""
    for done in range(len(losses) + 1):
        if when_loss_settles(History(done, 1000, losses[:done], batches, slope=slope)):
            return done
    return None


LOSS = st.sampled_from((0.0, 0.125, 0.25, 0.375, 0.5, 1.0, 2.0, 4.0))


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(LOSS, min_size=n, max_size=n), min_size=1, max_size=9)
    ),
    st.sampled_from((0.27, 0.25, -0.5)),
    st.sampled_from(("sum", "mean")),
    st.integers(1, 4),
)
def test_it_settles_when_that_of_plain_loops_does(
    epochs: list[list[float]], threshold: float, of: Any, over: int
) -> None:
    means = [sum(batches) / len(batches) for batches in epochs]
    expected = reference.epochs_until_the_loss_settles(epochs, threshold, over, mean=of == "mean")
    assert settles_after(means, len(epochs[0]), LossSlope(threshold, of, over)) == expected


CURVES = {
    "resnet110": (CIFAR10_RESNET110, CIFAR_BATCHES, 46),
    "vgg19": (CIFAR10_VGG19, CIFAR_BATCHES, 41),
    "imagenet": (IMAGENET_RESNET18, IMAGENET_BATCHES, 31),
}


@pytest.mark.parametrize("name", CURVES)
def test_on_long_runs_the_threshold_says_something(name: str) -> None:
    """About epoch 50 of CIFAR-10 (Figure 5), not the third, where the mean loss falls by less than 0.27."""
    losses, batches, expected = CURVES[name]
    assert settles_after(losses, batches, LossSlope()) == expected
    assert settles_after(losses, batches, LossSlope(of="mean", epochs=1)) == 3
    once = settles_after(losses, batches, LossSlope(epochs=1))
    assert once is not None
    assert once < expected, "a difference of two epochs is noise"


def entered(method: ClickTrain, epochs: int, losses: Sequence[float]) -> dict[str, float]:
    """Stage -> finished epochs when a run enters it, one batch an epoch, whose losses are given."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 12, 3), nn.Flatten(), nn.Linear(12, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = method.attach(model, optimizer, epochs=epochs, steps_per_epoch=1)
    for epoch in range(epochs):
        if pruner.frozen:
            break
        model(torch.ones(1, 1, 5, 5)).sum().backward()
        pruner.observe(torch.tensor(losses[min(epoch, len(losses) - 1)]))
        optimizer.step()
        optimizer.zero_grad()
    return {event["stage"]: event["epoch"] for event in pruner.events if event["event"] == "stage"}


@pytest.mark.parametrize("name", CURVES)
def test_the_papers_preset_prunes_where_table_1_does(name: str) -> None:
    losses, batches, settled = CURVES[name]
    epochs, table = (90, range(43, 44)) if name == "imagenet" else (190, range(90, 99))
    totals = [loss * batches for loss in losses]  # of an epoch, as one batch
    method = ClickTrain(compression=3, preset="paper")
    stages = entered(method, epochs, totals)
    assert stages["pool"] == min(settled, round(0.26 * epochs))
    assert stages["accelerated"] in table
    assert stages["regularize"] < stages["accelerated"]


def test_the_hard_prune_waits_for_its_time_or_for_the_length_of_stage_4() -> None:
    falling = [100.0 - epoch for epoch in range(100)]
    settled = [*falling[:10], *[50.0] * 90]
    method = ClickTrain(compression=3, preset="paper", earliest_start=0.05)
    early, late = (entered(method, 100, losses) for losses in (settled, falling))
    assert (early["pool"], early["finalize"], early["regularize"]) == (13, 21, 29)
    assert (late["pool"], late["finalize"], late["regularize"]) == (26, 34, 42)
    assert early["accelerated"] == late["accelerated"] == 48
    by_length = ClickTrain(compression=3, preset="paper", earliest_start=0.05, regularize_length=0.1)
    assert [entered(by_length, 100, losses)["accelerated"] for losses in (settled, falling)] == [39, 52]
