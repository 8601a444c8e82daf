"""Widths are by default multiples that the device takes without padding; here a device that wants fours."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clicktrain import PaT, PruneTrain
from clicktrain.latency.channel_multiple import LIKED
from clicktrain.methods.channels_then_patterns import ChannelsThenPatterns


@pytest.fixture
def _fours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIKED, "cpu", 4)  # type: ignore[arg-type]


def network() -> nn.Module:
    """Filters of the first layer whose norms are a permutation of 1 to 16."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 5, 3), nn.Flatten(), nn.Linear(45, 3))
    with torch.no_grad():
        norms = torch.randperm(16) + 1.0
        weight = model[0].weight
        weight.mul_((norms / weight.flatten(1).norm(dim=1))[:, None, None, None])  # type: ignore[operator, arg-type, union-attr]
    return model


def trained(method: Any, model: nn.Module, rate: float = 0.0) -> Any:
    x = torch.randn(4, 2, 7, 7, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    pruner = method.attach(model, optimizer, epochs=2, steps_per_epoch=2, example=x)
    for _ in range(4):
        loss = model(x).square().mean()
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruner.finish()
    return pruner, [str(one.message) for one in caught]


def pat(**settings: Any) -> PaT:
    return PaT(
        policy="epoch", prune_epoch=0, prune_steps=1, criterion="magnitude", exclude=("2", "4"), **settings
    )


@pytest.mark.usefixtures("_fours")
def test_pat_removes_the_smallest_up_to_a_multiple_and_compares_what_was_asked() -> None:
    model = network()
    weight: Tensor = model[0].weight.detach().clone()  # type: ignore[operator, union-attr, assignment]
    _, said = trained(pat(prune_ratio=0.3), model)
    largest = weight.flatten(1).norm(dim=1).argsort(descending=True)[:12].sort().values
    assert model[0].weight.equal(weight[largest]), "11 of 16 were asked for, 12 are the nearest four"  # type: ignore[operator, union-attr, arg-type]
    assert len(said) == 1
    assert "asked" in said[0]
    assert "widths are multiples of 4" in said[0]


@pytest.mark.usefixtures("_fours")
def test_a_number_goes_before_the_device() -> None:
    model = network()
    trained(pat(prune_ratio=0.3, round_to=1), model)
    assert model[0].weight.shape[0] == 11  # type: ignore[union-attr]


def test_other_devices_take_any_width() -> None:
    assert LIKED["cuda"] == 8
    model = network()
    trained(pat(prune_ratio=0.3), model)
    assert model[0].weight.shape[0] == 11  # type: ignore[union-attr]


@pytest.mark.usefixtures("_fours")
@pytest.mark.parametrize(("preset", "width"), [("default", 12), ("paper", 9)])
def test_prunetrain_keeps_what_fills_a_multiple_but_not_by_the_paper(preset: str, width: int) -> None:
    model = network()
    with torch.no_grad():
        small = model[0].weight.flatten(1).norm(dim=1).argsort()[:7]  # type: ignore[operator, union-attr]
        for tensor in (model[0].weight, model[0].bias):
            tensor[small] = 0  # type: ignore[index, operator]
        model[2].weight[:, small] = 0  # type: ignore[index, operator, union-attr]
    method = PruneTrain(preset=preset, coefficient=1e-9)  # type: ignore[arg-type]
    pruner, _ = trained(method, model)
    assert model[0].weight.shape[0] == width  # type: ignore[union-attr]
    events = [event for event in pruner.events if event["event"] == "reconfigured"]
    assert events[0]["round_to"] == (4 if preset == "default" else 1)


def test_the_composition_rounds_to_its_group_first() -> None:
    assert ChannelsThenPatterns().first.round_to == "device"
    assert ChannelsThenPatterns(group=4).first.round_to == 4
    assert ChannelsThenPatterns(group=4, round_to=6).first.round_to == 6
