"""Whoever subscribes to a pruner hears what it does, in a loop of one's own as in the trainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clicktrain.errors import MissedTarget
from clicktrain.methods import ClickTrain, Method, Pruner, PruneTrain
from clicktrain.methods.driver.publisher import (
    ChannelsRemoved,
    EpochEnd,
    MasksFrozen,
    Notification,
    ParametersReplaced,
)
from clicktrain.runs.events import Event, HardPruneEvent, from_json
from clicktrain.train import RunConfig, RunFolder
from clicktrain.train.device import seed_batch
from clicktrain.train.fit import fit
from clicktrain.train.prepare import Prepared, prepare

EPOCHS = 4
METHODS: dict[str, Method[Any]] = {
    "clicktrain": ClickTrain(compression=4),
    "prunetrain": PruneTrain(coefficient=0.085, interval=1, target_flops=0.5),
}


def config(method: str) -> RunConfig:
    return RunConfig(
        method=method,
        model="resnet8",
        width=0.5,
        epochs=EPOCHS,
        batch_size=256,
        threads=1,
        packed=method == "clicktrain",
        operators="reference",
        augment="none",
    )


def train(run: Prepared, epochs: int = EPOCHS) -> None:
    """The two lines in a loop that knows nothing of the trainer, on the trainer's batches."""
    run.model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissedTarget)
        for epoch in range(epochs):
            for number, batch in enumerate(run.train_loader.epoch(epoch)):
                seed_batch(0, epoch * len(run.train_loader) + number, run.device)
                loss = F.cross_entropy(run.model(batch.x), batch.y)
                loss.backward()  # type: ignore[no-untyped-call]
                run.pruner.observe(loss)
                run.optimizer.step()
                run.optimizer.zero_grad()
                run.scheduler.step()
        if epochs == EPOCHS:
            run.pruner.finish()


def untimed(event: Mapping[str, Any]) -> dict[str, Any]:
    """An event without what a clock said."""
    return {key: value for key, value in event.items() if not key.endswith("seconds")}


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_a_loop_of_ones_own_hears_what_the_trainer_writes(tmp_path: Path, name: str) -> None:
    fit(config(name), METHODS[name], tmp_path / "run")
    written = [untimed(line) for line in RunFolder(tmp_path / "run").read_events()]
    run = prepare(config(name), METHODS[name])
    heard = [from_json(event) for event in run.pruner.events]  # decided as it was attached
    run.pruner.subscribe(heard.append, Event)
    train(run)
    assert [untimed(event.to_json()) for event in heard] == written
    assert [untimed(event) for event in run.pruner.events] == written
    assert len(written) > 3


def test_a_subscriber_hears_the_kinds_it_asked_for() -> None:
    run = prepare(config("clicktrain"), METHODS["clicktrain"])
    everything: list[Event | Notification] = []
    frozen: list[HardPruneEvent | MasksFrozen] = []
    nothing: list[object] = []
    run.pruner.subscribe(everything.append)
    run.pruner.subscribe(frozen.append, (HardPruneEvent, MasksFrozen))
    run.pruner.subscribe(nothing.append).remove()
    train(run)
    assert [type(what) for what in frozen] == [HardPruneEvent, MasksFrozen]
    assert [what.epoch for what in everything if isinstance(what, EpochEnd)] == list(range(1, EPOCHS + 1))
    # Packed before the masks count as frozen, unpacked at the end.
    assert sum(isinstance(what, ParametersReplaced) for what in everything) == 2
    replaced = next(i for i, what in enumerate(everything) if isinstance(what, ParametersReplaced))
    assert replaced < next(i for i, what in enumerate(everything) if isinstance(what, MasksFrozen))
    assert {id(what) for what in frozen} <= {id(what) for what in everything}
    assert nothing == []


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_a_state_that_is_loaded_is_heard_of(name: str) -> None:
    first = prepare(config(name), METHODS[name])
    train(first, epochs=EPOCHS - 1)
    kinds = (ChannelsRemoved, MasksFrozen)
    assert len(first.pruner.plans) > 1 if name == "prunetrain" else first.pruner.frozen
    second = prepare(config(name), METHODS[name])
    heard: list[Notification] = []
    sizes: list[int] = []
    second.pruner.subscribe(heard.append, kinds)
    second.pruner.subscribe(lambda _: sizes.append(parameters(second.pruner)), ParametersReplaced)
    second.pruner.load_state_dict(first.pruner.state_dict())
    plans = [what.plan.to_json() for what in heard if isinstance(what, ChannelsRemoved)]
    assert plans == [plan.to_json() for plan in first.pruner.plans]
    assert sum(isinstance(what, MasksFrozen) for what in heard) == first.pruner.frozen
    assert sizes[-1] == parameters(first.pruner) < parameters(prepare(config(name), METHODS[name]).pruner)


def parameters(pruner: Pruner) -> int:
    return sum(parameter.numel() for parameter in pruner.model.parameters())


def test_a_wrapper_that_nobody_holds_does_not_listen() -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = ClickTrain(compression=2).attach(model, optimizer, epochs=4, steps_per_epoch=8)
    before = len(pruner.network.publisher._listeners)
    wrapped = pruner.wrapped(lambda network: network)
    assert len(pruner.network.publisher._listeners) == before + 1
    assert wrapped(torch.zeros(1, 1, 5, 5)).shape == (1, 2)
    del wrapped
    assert len(pruner.network.publisher._listeners) == before
