"""ClickTrain with an allocation and a penalty of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from own_loop import make, train
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.methods import ClickTrain
from clicktrain.methods.patterns.axes import ALLOCATIONS, PENALTIES
from clicktrain.methods.patterns.selection import PatternLayer

SCHEDULE: dict[str, Any] = {
    "earliest_start": 0.1, "latest_start": 0.1, "pool_length": 0.2, "finalize_length": 0.2,
    "regularize_length": 0.3,
}  # fmt: skip


def kernels(**settings: Any) -> dict[str, int]:
    model, optimizer = make()
    pruner = ClickTrain(compression=5, **SCHEDULE, **settings).attach(
        model, optimizer, epochs=1, steps_per_epoch=20
    )
    train(model, optimizer, pruner, 20)
    pruner.finish()
    event = next(event for event in pruner.events if event["event"] == "finalised")
    return {layer["name"]: layer["kernels_per_filter"] for layer in event["layers"]}


def most_for_the_last(layer: PatternLayer, scores: Tensor) -> Tensor:
    return torch.full((scores.shape[1],), float(layer.name == "deep"), dtype=torch.float64)


def halve_gradients(grad: Tensor, weight: Tensor, mask: Tensor, coefficient: float | Tensor) -> None:
    halved.append(grad.shape == weight.shape == mask.shape)
    grad.mul_(0.5)


halved: list[bool] = []


@pytest.mark.filterwarnings("ignore::clicktrain.errors.MissedTarget")
def test_an_allocation_of_ones_own_decides() -> None:
    even = kernels()
    own = kernels(allocation=most_for_the_last, allocation_floor=0)
    assert own["deep"] > 2 * even["deep"]
    ALLOCATIONS.register("last")(most_for_the_last)
    try:
        assert kernels(allocation="last", allocation_floor=0) == own
    finally:
        ALLOCATIONS.remove("last")
    with pytest.raises(UserError, match=r"allocation must be one of uniform, .*, not 'last'"):
        ClickTrain(allocation="last")


@pytest.mark.filterwarnings("ignore::clicktrain.errors.MissedTarget")
def test_a_penalty_of_ones_own_acts_in_stage_4() -> None:
    halved.clear()
    layers = kernels(penalty=halve_gradients)
    assert len(halved) == 6 * len(layers) + 1, "0.3 of 20 steps, and the trial at attach"
    assert all(halved)
    assert "halve_gradients" not in PENALTIES
