"""ClickTrain from the first batch to the last in a loop that is not the library's own."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_loop import OPTIMIZERS, PRUNED, assert_pruned, batches, conv_weights, entered, make, train
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.methods import ClickTrain
from clicktrain.methods.clicktrain import STAGES
from clicktrain.methods.patterns.settings import PRESETS

# ---------------------------------------------------------------- the five stages


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize(
    ("epochs", "steps"), [(1, 5), (5, 1), (1, 6), (2, 3), (3, 3), (2, 7), (10, 2), (1, 31), (6, 10)]
)
def test_every_run_passes_all_stages(preset: Any, epochs: int, steps: int) -> None:
    model, optimizer = make()
    pruner = ClickTrain(compression=4, preset=preset).attach(
        model, optimizer, epochs=epochs, steps_per_epoch=steps
    )
    assert pruner.stage == "dense"
    assert not pruner.masks
    train(model, optimizer, pruner, epochs * steps)
    assert pruner.frozen, "before the last batch, not by finish()"
    assert tuple(entered(pruner)) == STAGES[1:]
    assert list(entered(pruner).values()) == sorted(entered(pruner).values())
    assert entered(pruner)["accelerated"] < epochs * steps, "at least one batch at fixed positions"
    kinds = [event["event"] for event in pruner.events]
    assert kinds == ["stage", "pool", "stage", "finalised", "stage", "hard_prune", "stage"]
    json.dumps(pruner.events)
    assert pruner.finish() is model
    assert_pruned(model, pruner, 4)


def test_a_run_that_is_too_short_for_its_stages_is_refused() -> None:
    for total in range(1, 5):
        model, optimizer = make()
        with pytest.raises(UserError, match=f"{total} batches is too short"):
            ClickTrain(compression=4).attach(model, optimizer, epochs=total, steps_per_epoch=1)


@pytest.mark.parametrize(("epochs", "steps"), [(0, 5), (5, 0), (-1, 5)])
def test_an_empty_run_is_refused(epochs: int, steps: int) -> None:
    model, optimizer = make()
    with pytest.raises(UserError, match="at least 1 epoch"):
        ClickTrain().attach(model, optimizer, epochs=epochs, steps_per_epoch=steps)


@pytest.mark.parametrize("optimizer_name", ["nesterov", "adamw"])
@pytest.mark.parametrize("stop", [*range(10), 13])
@pytest.mark.filterwarnings("ignore:the loop ended after")
def test_a_run_that_ends_early_still_ends_at_the_compression(stop: int, optimizer_name: str) -> None:
    model, optimizer = make(optimizer=optimizer_name)
    pruner = ClickTrain(compression=4, group=2).attach(model, optimizer, epochs=2, steps_per_epoch=10)
    train(model, optimizer, pruner, stop)
    pruner.finish()
    assert pruner.stage == "accelerated"
    assert pruner.frozen
    assert_pruned(model, pruner, 4)
    with pytest.warns(UserWarning, match="finish was called twice"):
        assert pruner.finish() is model
    assert_pruned(model, pruner, 4)


def test_stages_start_within_their_bounds() -> None:
    method = ClickTrain(
        compression=4, earliest_start=0.2, latest_start=0.5,
        pool_length=0.1, finalize_length=0.1, regularize_length=0.1,
    )  # fmt: skip
    # A flat loss fires the trigger at once, but not before the earliest start.
    model, optimizer = make()
    optimizer.param_groups[0]["lr"] = 0.0
    pruner = method.attach(model, optimizer, epochs=20, steps_per_epoch=2)
    train(model, optimizer, pruner, 40)
    assert entered(pruner) == {"pool": 8, "finalize": 12, "regularize": 16, "accelerated": 20}

    # A loss that keeps falling steeply never fires it; the latest start does.
    model, optimizer = make()
    pruner = method.attach(model, optimizer, epochs=10, steps_per_epoch=4)
    for number, (x, y) in enumerate(batches(40)):
        F.cross_entropy(model(x), y).backward()
        pruner.observe(torch.tensor(100.0 - number))
        optimizer.step()
        optimizer.zero_grad()
    assert entered(pruner) == {"pool": 20, "finalize": 24, "regularize": 28, "accelerated": 32}


# ---------------------------------------------------------------- what a run ends with


@pytest.mark.parametrize("optimizer_name", list(OPTIMIZERS))
@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("compression", [3.0, 6.0])
def test_filters_are_equal_and_the_target_is_met(
    optimizer_name: str, preset: Any, compression: float
) -> None:
    model, optimizer = make(optimizer=optimizer_name)
    pruner = ClickTrain(compression=compression, preset=preset).attach(
        model, optimizer, epochs=2, steps_per_epoch=8
    )
    train(model, optimizer, pruner, 16)
    assert_pruned(model, pruner, compression)
    pruner.finish()
    assert_pruned(model, pruner, compression)
    kept = {row.name: row.nnz_per_filter for row in pruner.plan().rows if row.name in PRUNED}
    assert kept == {name: int(mask[0].sum()) for name, mask in pruner.masks.items()}
    assert "reached" in str(pruner.plan())


@pytest.mark.parametrize("allocation", ["uniform", "importance", "relative", "erk"])
@pytest.mark.parametrize("group", [1, 2, 4, 64])
def test_every_allocation_and_group_meets_the_target(allocation: Any, group: int) -> None:
    model, optimizer = make()
    method = ClickTrain(compression=5, allocation=allocation, group=group)
    pruner = method.attach(model, optimizer, epochs=1, steps_per_epoch=8)
    train(model, optimizer, pruner, 8)
    assert_pruned(model, pruner, 5)
    for name, mask in pruner.masks.items():
        together = min(group, mask.shape[0])
        rows = mask.unflatten(0, (-1, together))
        assert (rows == rows[:, :1]).all(), name


def test_overrides_exclusions_and_inclusions() -> None:
    model, optimizer = make()
    method = ClickTrain(compression=3, layers={"point": 4.0}, exclude=("flat",), include=("stem",))
    pruner = method.attach(model, optimizer, epochs=1, steps_per_epoch=10)
    train(model, optimizer, pruner, 10)
    assert pruner.masks["point"].float().mean().item() == pytest.approx(1 / 4)
    assert_pruned(model, pruner, 3, names=("stem", "square", "point", "large", "deep"))
    reasons = {row.name: row.reason for row in pruner.plan().rows}
    assert reasons["flat"] == "excluded"


@pytest.mark.parametrize("compression", [1.5, 60.0, 1e9])
def test_an_impossible_compression_is_refused_with_the_possible_range(compression: float) -> None:
    model, optimizer = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"cannot be met.*\d+\.\d\dx to \d+\.\d\dx"):
        ClickTrain(compression=compression).attach(model, optimizer, epochs=10, steps_per_epoch=10)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    train(
        model, optimizer, ClickTrain(compression=4).attach(model, optimizer, epochs=1, steps_per_epoch=9), 1
    )


@pytest.mark.parametrize("compression", [1.0, 0.5, -3.0, float("nan"), float("inf")])
def test_a_meaningless_compression_is_refused(compression: float) -> None:
    model, optimizer = make()
    with pytest.raises(UserError, match="compression"):
        ClickTrain(compression=compression).attach(model, optimizer, epochs=10, steps_per_epoch=10)


def test_a_penalty_moves_energy_into_the_kept_positions_before_the_hard_prune() -> None:
    energy = {}
    for penalty in ("none", "lasso", "shrink"):
        model, optimizer = make()
        method = ClickTrain(compression=5, penalty=penalty, lasso=0.05, regularize_length=0.4)
        pruner = method.attach(model, optimizer, epochs=2, steps_per_epoch=15)
        train(model, optimizer, pruner, 30)
        event = next(event for event in pruner.events if event["event"] == "hard_prune")
        energy[penalty] = event["energy_outside"]
    assert energy["lasso"] < 0.9 * energy["none"]
    assert energy["shrink"] < 0.05 * energy["none"]


# ---------------------------------------------------------------- pruned positions stay zero


@pytest.mark.parametrize(
    ("optimizer_name", "penalty"),
    [*((name, "shrink") for name in OPTIMIZERS), ("nesterov", "lasso"), ("adamw", "none")],
)
def test_pruned_positions_never_come_back(optimizer_name: str, penalty: Any) -> None:
    model, optimizer = make(optimizer=optimizer_name)
    pruner = ClickTrain(compression=5, penalty=penalty).attach(model, optimizer, epochs=1, steps_per_epoch=20)
    checked = 0
    at_prune: dict[str, Tensor] = {}

    def check(number: int) -> None:
        nonlocal checked
        if not pruner.frozen:
            return
        checked += 1
        pruner.check_zeros()
        for name, weight in conv_weights(model).items():
            if name not in pruner.masks:
                continue
            mask = pruner.masks[name]
            at_prune.setdefault(name, weight.clone())
            assert weight[~mask].eq(0).all(), (name, number)
            state = optimizer.state[model.get_submodule(name).weight]
            tensors = [v for v in state.values() if isinstance(v, Tensor) and v.shape == mask.shape]
            assert tensors
            assert all(v[~mask].eq(0).all() for v in tensors), (name, number)

    train(model, optimizer, pruner, 20, after_step=check)
    with pytest.warns(UserWarning, match="the loop runs longer than attach expects"):
        train(model, optimizer, pruner, 120 - checked, start=20, after_step=check)
    assert checked == 100
    for name, before in at_prune.items():
        mask = pruner.masks[name]
        moved = conv_weights(model)[name][mask] != before[mask]
        assert moved.float().mean() > 0.9, "the kept weights go on learning"


class NoisySGD(torch.optim.SGD):
    """Moves every weight whatever its gradient, as samplers and some regularisers do."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(torch.randn_like(p), alpha=1e-3)


def test_an_optimizer_that_moves_weights_without_a_gradient_is_masked_as_well() -> None:
    model, _ = make()
    optimizer = NoisySGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = ClickTrain(compression=5).attach(model, optimizer, epochs=1, steps_per_epoch=20)
    train(model, optimizer, pruner, 20, after_step=lambda _: pruner.check_zeros())
    assert pruner.frozen
    assert_pruned(model, pruner, 5)


def test_a_weight_that_comes_back_is_reported() -> None:
    model, optimizer = make()
    pruner = ClickTrain(compression=5).attach(model, optimizer, epochs=1, steps_per_epoch=10)
    train(model, optimizer, pruner, 10)
    mask = pruner.masks["deep"]
    pruner.check_zeros()
    momentum = optimizer.state[model.deep.weight]["momentum_buffer"]
    momentum[~mask] = 1.0
    with pytest.raises(AssertionError, match="deep"):
        pruner.check_zeros()
    momentum[~mask] = 0.0
    with torch.no_grad():
        model.deep.weight[~mask] = 1e-12
    with pytest.raises(AssertionError, match="deep"):
        pruner.check_zeros()
