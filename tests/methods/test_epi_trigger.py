"""EPI as the trigger of methods that prune kernels (When to Prune?, Eq. (4) to (6))."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from own_loop import assert_same, batches, entered, make, snapshot, train

from clicktrain import Campfire, ClickTrain
from clicktrain.errors import UserError
from clicktrain.methods import Method, Pruner

EPOCHS, PER_EPOCH = 10, 4


def attach(method: Method[Any]) -> Pruner:
    model, optimizer = make()
    return method.attach(model, optimizer, epochs=EPOCHS, steps_per_epoch=PER_EPOCH)


def clicktrain(**settings: Any) -> ClickTrain:
    return ClickTrain(compression=4, trigger="epi", epi_window=1, epi_history=0, **settings)


def campfire(**settings: Any) -> Campfire:
    return Campfire(sparsity=0.6, trigger="epi", epi_window=1, epi_history=0, era=(6, 8), **settings)


MAKERS = {"clicktrain": clicktrain, "campfire": campfire}
FIRST_STAGE = {"clicktrain": "pool", "campfire": "era"}


@pytest.mark.parametrize("name", MAKERS)
def test_begins_when_the_structure_is_stable(name: str) -> None:
    pruner = attach(MAKERS[name](epi_threshold=0.0))
    train(pruner.model, pruner.optimizer, pruner, EPOCHS * PER_EPOCH)
    epi = [event for event in pruner.events if event["event"] == "epi"]
    assert [event["epoch"] for event in epi] == [1.0, 2.0], "none once it has begun"
    assert entered(pruner)[FIRST_STAGE[name]] == 2 * PER_EPOCH
    reason = next(e["reason"] for e in pruner.events if e["event"] == "stage")
    assert reason.startswith("the structure is stable: EPI")
    pruner.finish()
    assert pruner.frozen


@pytest.mark.parametrize("name", MAKERS)
def test_begins_at_its_own_time_at_the_latest(name: str) -> None:
    pruner = attach(MAKERS[name](epi_threshold=1.0, criterion="taylor"))
    train(pruner.model, pruner.optimizer, pruner, EPOCHS * PER_EPOCH)
    latest = {"clicktrain": round(0.44 * EPOCHS * PER_EPOCH), "campfire": 6 * PER_EPOCH}[name]
    assert entered(pruner)[FIRST_STAGE[name]] == latest


def test_an_era_that_begins_earlier_has_its_length_and_its_thresholds() -> None:
    pruner = attach(campfire(epi_threshold=0.0))
    train(pruner.model, pruner.optimizer, pruner, EPOCHS * PER_EPOCH)
    own = attach(Campfire(sparsity=0.6, era=(6, 8)))
    train(own.model, own.optimizer, own, EPOCHS * PER_EPOCH)
    assert entered(pruner) == {"era": 8, "fixed": 16}
    assert entered(own) == {"era": 24, "fixed": 32}
    first, second = (
        [(e["event"], e.get("threshold")) for e in p.events if e["event"] != "epi"] for p in (pruner, own)
    )
    assert first == second


@pytest.mark.parametrize("criterion", ["magnitude", "taylor", "mixed"])
@pytest.mark.parametrize("name", MAKERS)
def test_structures_are_counted_over_the_whole_network(name: str, criterion: Any) -> None:
    method = MAKERS[name](epi_threshold=1.0, criterion=criterion)
    pruner = attach(method)
    layers = {layer.name: layer.module for layer in pruner.network.prunable.convs}
    sums: dict[tuple[str, int, int], float] = {}
    for x, y in batches(PER_EPOCH):
        loss = F.cross_entropy(pruner.model(x), y)
        loss.backward()
        pruner.observe(loss)
        for layer, module in layers.items():
            w, g = module.weight.detach().double(), module.weight.grad.double()
            score = {"magnitude": w**2, "taylor": (g * w) ** 2, "mixed": g.abs() * w**2}[criterion]
            for f in range(w.shape[0]):
                for c in range(w.shape[1]):
                    mean = float(score[f, c].mean())
                    before = 0.0 if criterion == "magnitude" else sums.get((layer, f, c), 0.0)
                    sums[layer, f, c] = before + mean
        pruner.optimizer.step()
        pruner.optimizer.zero_grad()
    event = next(e for e in pruner.events if e["event"] == "epi")
    kept = sum(event["structure"].values())
    share = kept / len(sums)
    if name == "campfire":
        assert kept == round(0.4 * len(sums))
    else:
        assert 1 / 4 < share < 9 / 16, "more kernels than weights, as patterns take from each"
    best = sorted(sums, key=lambda key: -sums[key])[:kept]
    assert event["structure"] == {layer: sum(key[0] == layer for key in best) for layer in layers}
    assert event["epi"] is None
    assert event["threshold"] == 1.0


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("stop", [3, 6, 9])
def test_goes_on_bit_for_bit(name: str, stop: int) -> None:
    method = MAKERS[name](epi_threshold=0.0, criterion="taylor")
    total = EPOCHS * PER_EPOCH
    whole = attach(method)
    train(whole.model, whole.optimizer, whole, total)
    first = attach(method)
    train(first.model, first.optimizer, first, stop)
    second = attach(method)
    second.load_state_dict(first.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    train(second.model, second.optimizer, second, total, start=stop)
    assert whole.events == second.events
    assert_same(snapshot(whole.finish(), whole), snapshot(second.finish(), second))


@pytest.mark.parametrize("method", [ClickTrain, Campfire])
def test_settings(method: type[Method[Any]]) -> None:
    with pytest.raises(UserError, match="trigger must be one of own, epi"):
        method(trigger="soon")  # type: ignore[call-arg]
    with pytest.raises(UserError, match="epi_threshold must be between 0 and 1"):
        method(epi_threshold=1.5)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="epi_window must be at least 1"):
        method(epi_window=0)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="epi_history must be 0 to 5"):
        method(epi_history=6)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="loss_slope_epochs must be at least 1"):
        method(loss_slope_epochs=0)  # type: ignore[call-arg]


def test_thresholds_by_criterion() -> None:
    assert "EPI over 1 epochs is at least 0.983" in str(attach(clicktrain()).plan())
    assert "EPI over 1 epochs is at least 0.944" in str(attach(clicktrain(criterion="taylor")).plan())
    assert "EPI is at least 0.983" in str(attach(campfire()).plan())
