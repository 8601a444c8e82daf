"""Loss scaling, autocast, gradient accumulation, and loops that call less than they should."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_loop import OPTIMIZERS, assert_pruned, assert_same, batches, entered, make, snapshot, train
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.methods import ClickTrain
from clicktrain.methods.clicktrain import STAGES
from clicktrain.methods.patterns.settings import PRESETS


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("optimizer_name", list(OPTIMIZERS))
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_loss_scaling_changes_nothing(preset: Any, optimizer_name: str, unscale: bool) -> None:
    """Scales that are powers of two are exact; they grow during the run, so batches have different ones."""
    results: list[dict[str, Tensor]] = []
    for scale in (None, 2.0**6):
        model, optimizer = make(optimizer=optimizer_name)
        # A strong lasso: added to scaled gradients without its own scale it would hardly act.
        method = ClickTrain(
            compression=5,
            preset=preset,
            lasso=0.05,
            finalize_length=0.3,
            regularize_length=0.3,
            earliest_start=0.2,
            latest_start=0.2,
        )
        pruner = method.attach(model, optimizer, epochs=2, steps_per_epoch=10)
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        train(model, optimizer, pruner, 20, scaler=scaler, unscale=unscale)
        assert pruner.frozen
        results.append(snapshot(model, pruner))
    plain, scaled = results
    for name, value in plain.items():
        # Fused optimizers get the lasso multiplied by the scale: rounded once more, in the last place.
        torch.testing.assert_close(scaled[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("optimizer_name", list(OPTIMIZERS))
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_steps_that_the_scaler_skips_are_not_counted(preset: Any, optimizer_name: str) -> None:
    """Infinite gradients in every stage: nothing infinite gets into votes, pools or weights."""
    model, optimizer = make(optimizer=optimizer_name)
    lengths = {"pool_length": 0.1, "finalize_length": 0.1, "regularize_length": 0.1}
    method = ClickTrain(compression=5, preset=preset, **lengths)
    pruner = method.attach(model, optimizer, epochs=4, steps_per_epoch=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    skipped: set[str] = set()
    for number, (x, y) in enumerate(batches(40)):
        loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        if number % 3 == 1:  # not the very first: fused SGD starts its momentum from what lies in memory
            skipped.add(pruner.stage)
            for p in model.parameters():
                p.grad.fill_(float("inf"))
        pruner.observe(loss)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert len(skipped) >= 4
    assert_pruned(model, pruner, 5)
    pruner.check_zeros()
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_bf16_autocast_runs_and_a_step_inside_it_decides_the_same() -> None:
    results = []
    for inside in (False, True):
        model, optimizer = make()
        pruner = ClickTrain(compression=5, preset="paper").attach(
            model, optimizer, epochs=2, steps_per_epoch=15
        )
        for x, y in batches(30):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            with torch.autocast("cpu", torch.bfloat16) if inside else nullcontext():
                pruner.observe(loss)
                optimizer.step()
            optimizer.zero_grad()
        pruner.check_zeros()
        assert_pruned(model, pruner, 5)
        results.append(snapshot(model, pruner))
    assert_same(*results)


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("accumulate", [2, 3, 5])
def test_gradient_accumulation(preset: Any, accumulate: int) -> None:
    model, optimizer = make()
    pruner = ClickTrain(compression=5, preset=preset).attach(model, optimizer, epochs=3, steps_per_epoch=20)
    train(model, optimizer, pruner, 60, accumulate=accumulate)
    assert tuple(entered(pruner)) == STAGES[1:]
    pruner.check_zeros()
    assert_pruned(model, pruner, 5)


@pytest.mark.parametrize("divisor", [1.0, 8.0])
def test_a_summed_loss_decides_as_a_mean_loss_does(divisor: float) -> None:
    """Selection ranks weights of one network against each other, so a constant factor is of no importance."""
    masks = []
    for factor in (1.0, divisor):
        model, optimizer = make()
        optimizer.param_groups[0].update(lr=0.0, weight_decay=0.0)
        method = ClickTrain(compression=5, preset="paper", penalty="none")
        pruner = method.attach(model, optimizer, epochs=2, steps_per_epoch=10)
        for x, y in batches(20):
            loss = F.cross_entropy(model(x), y) / factor
            loss.backward()
            pruner.observe(loss)
            optimizer.step()
            optimizer.zero_grad()
        masks.append(pruner.masks)
    assert_same(*masks)


def test_skipping_observe_leaves_the_network_dense_until_the_end() -> None:
    model, optimizer = make()
    pruner = ClickTrain(compression=5).attach(model, optimizer, epochs=1, steps_per_epoch=10)
    for x, y in batches(10):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert pruner.stage == "dense"
    with pytest.warns(UserWarning, match="ended after 0 of the 1 epochs"):
        pruner.finish()
    assert_pruned(model, pruner, 5)


def test_observe_wants_a_scalar() -> None:
    model, optimizer = make()
    pruner = ClickTrain(compression=5).attach(model, optimizer, epochs=1, steps_per_epoch=10)
    with pytest.raises(UserError, match="scalar"):
        pruner.observe(torch.ones(3))


def test_close_takes_the_hooks_away() -> None:
    model, optimizer = make()
    pruner = ClickTrain(compression=5).attach(model, optimizer, epochs=1, steps_per_epoch=10)
    pruner.close()
    with pytest.raises(UserError, match=r"observe was called after close\(\)"):
        train(model, optimizer, pruner, 10)
    for x, y in batches(20):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert pruner.stage == "dense"
    assert not pruner.events
