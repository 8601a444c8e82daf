"""Saved after any batch, a run goes on as if it had never stopped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from own_loop import OPTIMIZERS, assert_same, make, snapshot, train
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.methods import ClickTrain, Pruner
from clicktrain.methods.clicktrain import STAGES
from clicktrain.methods.patterns.settings import PRESETS


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("optimizer_name", ["nesterov", "adamw"])
def test_going_on_from_a_saved_state_is_the_same_run(preset: Any, optimizer_name: str) -> None:
    """Saved after every single batch of a run, so in the middle of each stage."""
    total = 16
    settings: dict[str, Any] = {"compression": 5.0, "preset": preset}
    if preset == "paper" and optimizer_name == "adamw":
        settings.update(early_penalty="summed")  # what was summed belongs to the state
    if preset != "one-shot":
        settings.update(pool_length=0.15, finalize_length=0.15, regularize_length=0.15)
        # The loss slope decides within these bounds, so the epochs' losses belong to the state.
        settings.update(earliest_start=0.0, latest_start=0.5)
    method = ClickTrain(**settings)
    model, optimizer = make(optimizer=optimizer_name)
    pruner = method.attach(model, optimizer, epochs=8, steps_per_epoch=2)
    saved: list[tuple[str, Any]] = []

    def save(_: int) -> None:
        states = (model.state_dict(), optimizer.state_dict(), pruner.state_dict())
        saved.append((pruner.stage, copy.deepcopy(states)))

    train(model, optimizer, pruner, total, after_step=save)
    uninterrupted = snapshot(model, pruner)
    expected_stages = {"dense", "finalize", "accelerated"} if preset == "one-shot" else set(STAGES)
    assert {stage for stage, _ in saved} == expected_stages

    for done, (stage, (weights, moments, state)) in enumerate(saved, start=1):
        model, optimizer = make(seed=99, optimizer=optimizer_name)
        again = method.attach(model, optimizer, epochs=8, steps_per_epoch=2)
        again.load_state_dict(state)
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        assert again.stage == stage
        train(model, optimizer, again, total, start=done)
        assert_same(snapshot(model, again), uninterrupted)
        assert again.events == pruner.events
        assert str(again.plan()) == str(pruner.plan())


def measured(pruner: Pruner) -> dict[str, Tensor]:
    return {"loss of the last step measured": pruner.state_dict()["state"]["previous_loss"]}


def test_going_on_in_the_middle_of_an_accumulated_step() -> None:
    """The losses seen so far belong to the state."""
    method = ClickTrain(
        compression=5, preset="paper", finalize_length=0.4, regularize_length=0.08, loss_margin=0.0,
        loss_margin_rule="increase",
    )  # fmt: skip
    model, optimizer = make()
    pruner = method.attach(model, optimizer, epochs=2, steps_per_epoch=16)
    saved = []

    def save(_: int) -> None:
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        states = (model.state_dict(), optimizer.state_dict(), pruner.state_dict(), grads)
        saved.append(copy.deepcopy(states))

    train(model, optimizer, pruner, 32, accumulate=3, after_step=save)
    uninterrupted = {**snapshot(model, pruner), **measured(pruner)}
    for done in (1, 4, 10, 11, 13, 14, 16, 17, 19, 20, 26):
        weights, moments, state, grads = saved[done - 1]
        model, optimizer = make(seed=99)
        again = method.attach(model, optimizer, epochs=2, steps_per_epoch=16)
        again.load_state_dict(state)
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad
        train(model, optimizer, again, 32, start=done, accumulate=3)
        assert_same({**snapshot(model, again), **measured(again)}, uninterrupted)
        assert again.events == pruner.events  # what was measured shows in what was chosen


def test_two_runs_that_go_on_from_one_state_do_not_share_it() -> None:
    method = ClickTrain(compression=5, preset="paper", finalize_length=0.3, regularize_length=0.08)
    model, optimizer = make()
    first = method.attach(model, optimizer, epochs=1, steps_per_epoch=20)
    train(model, optimizer, first, 10)
    assert first.stage == "finalize"
    other_model = copy.deepcopy(model)
    other_optimizer = OPTIMIZERS["nesterov"](other_model.parameters())
    second = method.attach(other_model, other_optimizer, epochs=1, steps_per_epoch=20)
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(second.state_dict())
    train(model, optimizer, first, 12, start=10)
    after = second.state_dict()
    for name, votes in before["state"]["selection"]["votes"].items():
        assert torch.equal(votes, after["state"]["selection"]["votes"][name])


def test_the_state_of_another_method_is_refused() -> None:
    model, optimizer = make()
    pruner = ClickTrain(compression=5).attach(model, optimizer, epochs=1, steps_per_epoch=20)
    with pytest.raises(UserError, match="'dense'"):
        pruner.load_state_dict({**pruner.state_dict(), "method": "dense"})
