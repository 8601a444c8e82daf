"""PruneTrain in anybody's loop: what goes, when, and that nothing else changes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain import PruneTrain, create_model
from clicktrain.errors import NetworkCollapsed, UserError
from clicktrain.methods import Pruner
from clicktrain.surgery import plan_from_zeros

STEPS = 4
"""Batches in an epoch."""


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_model("resnet8", num_classes=4, in_channels=3, width=0.5, stem="cifar")


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    y = torch.randint(0, 4, (8,), generator=generator)
    return torch.randn(8, 3, 8, 8, generator=generator) + y.view(8, 1, 1, 1) * 0.5, y


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, first: int, last: int) -> None:
    for number in range(first, last):
        x, y = batch(number)
        loss = F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
}
STRONG: dict[str, Any] = {"coefficient": 0.1, "interval": 1, "check_outputs": True}


def epochs_of(pruner: Pruner) -> list[float]:
    return [event["epoch"] for event in pruner.events if event["event"] == "reconfigured"]


def removed(pruner: Pruner) -> int:
    events = [event for event in pruner.events if event["event"] == "reconfigured"]
    return sum(event["channels_before"] - event["channels_after"] for event in events)


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scheme", ["union", "gating"])
def test_channels_go_and_the_function_stays(name: str, scheme: str) -> None:
    model = network().double()
    optimizer = OPTIMIZERS[name](model.parameters())
    strength = {"sgd": 0.1, "adamw": 8.0}[name]
    method = PruneTrain(**{**STRONG, "coefficient": strength}, scheme=scheme)  # type: ignore[arg-type]
    pruner = method.attach(model, optimizer, epochs=5, steps_per_epoch=STEPS)
    train(model, optimizer, pruner, 0, 5 * STEPS)
    pruner.finish()
    assert removed(pruner) > 10
    changes = [e["max_output_change"] for e in pruner.events if e["event"] == "reconfigured"]
    assert max(change for change in changes if change is not None) < 1e-5
    parameters = {id(p) for p in model.parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == parameters  # the same optimizer trains what there is, all of it
    for parameter in held:
        for value in optimizer.state[parameter].values():
            if isinstance(value, Tensor) and value.numel() > 1:
                assert value.shape == parameter.shape


def test_a_run_goes_on_as_the_masked_network_would() -> None:
    """Removing channels that nothing reads changes no later step of the channels that stay."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = PruneTrain(**STRONG).attach(model, optimizer, epochs=9, steps_per_epoch=STEPS)
    train(model, optimizer, pruner, 0, 2 * STEPS)
    assert removed(pruner) > 0
    before = copy.deepcopy(model)
    x, _ = batch(0)
    torch.testing.assert_close(before(x), model(x))


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"interval": 2}, [2, 4, 6, 6]),
        ({"interval": 4}, [4, 6]),
        ({"reconfigure": "once", "once_at": 3}, [3, 6]),
        ({"reconfigure": "end"}, [6]),
        ({}, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_when_it_reconfigures(settings: dict[str, Any], expected: list[int]) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = PruneTrain(**settings).attach(model, optimizer, epochs=6, steps_per_epoch=STEPS)
    train(model, optimizer, pruner, 0, 6 * STEPS)
    pruner.finish()
    assert epochs_of(pruner) == sorted(set(expected))


@pytest.mark.long
@pytest.mark.parametrize("reconfigure", ["interval", "once", "end"])
def test_no_zero_channel_is_left_at_the_end(reconfigure: Any) -> None:
    """However the comparisons of the paper reconfigure while they train, what is reported is what is left."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    method = PruneTrain(
        coefficient=0.4, reconfigure=reconfigure, once_at=1 if reconfigure == "once" else None
    )
    pruner = method.attach(model, optimizer, epochs=4, steps_per_epoch=STEPS)
    train(model, optimizer, pruner, 0, 4 * STEPS)
    pruner.finish()
    assert removed(pruner) > 0
    assert epochs_of(pruner)[-1] == 4
    assert not plan_from_zeros(model, batch(0)[0], sides="readers").cuts


def test_the_last_epochs_are_without_the_lasso() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    settings = {"coefficient": 0.1, "update": "gradient", "fine_tune": 2}
    pruner = PruneTrain(**settings).attach(model, optimizer, epochs=4, steps_per_epoch=STEPS)  # type: ignore[arg-type]
    train(model, optimizer, pruner, 0, 2 * STEPS - 1)
    assert pruner.stage == "sparsify"
    train(model, optimizer, pruner, 2 * STEPS - 1, 2 * STEPS)
    assert pruner.stage == "fine-tune"
    x, y = batch(0)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    pruner.observe(loss)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert all(
        torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True) if p.grad is not None
    )


def test_a_plan_shows_what_would_go_and_changes_nothing() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with torch.no_grad():
        model.layer2[0].conv2.weight[:, 3] = 1e-5  # type: ignore[union-attr,index]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = PruneTrain().attach(model, optimizer, epochs=6, steps_per_epoch=STEPS, example=batch(0)[0])
    plan = pruner.plan()
    row = next(row for row in plan.rows if row.name == "layer2.0.conv2")
    assert row.density == pytest.approx(15 / 16)
    assert "would be removed" in plan.summary
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.long
def test_resumed_state_is_the_same_run() -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        pruner = PruneTrain(**STRONG).attach(
            model, optimizer, epochs=5, steps_per_epoch=STEPS, example=batch(0)[0]
        )
        return model, optimizer, pruner

    model, optimizer, pruner = start()
    train(model, optimizer, pruner, 0, 2 * STEPS + 1)
    assert pruner.plans
    saved = copy.deepcopy((pruner.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, pruner, 2 * STEPS + 1, 5 * STEPS)
    other, second, again = start()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    train(other, second, again, 2 * STEPS + 1, 5 * STEPS)
    a, b = model.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert again.plans == pruner.plans


def test_epochs_of_another_length() -> None:
    """The batch has grown: fewer batches make an epoch, and reconfigurations keep to epochs."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = PruneTrain(interval=1).attach(model, optimizer, epochs=4, steps_per_epoch=STEPS)
    train(model, optimizer, pruner, 0, STEPS)
    pruner.resize_epoch(2)
    train(model, optimizer, pruner, 0, 4)
    assert epochs_of(pruner) == [1, 2, 3]
    train(model, optimizer, pruner, 0, 1)
    with pytest.raises(UserError, match="between two epochs"):
        pruner.resize_epoch(3)


def test_widths_are_multiples_and_the_price_is_told() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = PruneTrain(**STRONG, round_to=4).attach(model, optimizer, epochs=4, steps_per_epoch=STEPS)
    train(model, optimizer, pruner, 0, 4 * STEPS)
    pruner.finish()
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(width % 4 == 0 for width in widths)
    events = [event for event in pruner.events if event["event"] == "reconfigured"]
    assert any(event["channels_without_rounding"] < event["channels_after"] for event in events)


@pytest.mark.long
def test_the_multiple_is_measured_at_every_reconfiguration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLICKTRAIN_LATENCY_CACHE", str(tmp_path))
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = PruneTrain(**STRONG, round_to="auto").attach(model, optimizer, epochs=4, steps_per_epoch=STEPS)
    train(model, optimizer, pruner, 0, 4 * STEPS)
    pruner.finish()
    events = [event for event in pruner.events if event["event"] in ("widths", "reconfigured")]
    assert any(event["event"] == "widths" for event in events)
    chosen = 1
    for event in events:  # each choice is told before what it led to
        if event["event"] == "widths":
            chosen = event["chosen"]
            assert event["images"] == 8
        else:
            assert event["round_to"] == chosen
            kept = {row["multiple"]: row["channels"] for row in events[0]["rows"]}
            assert kept[1] <= kept[32]
    assert pruner.state_dict()["state"]["round_to"] == chosen
    assert model(batch(0)[0]).shape == (8, 4)


def test_a_network_without_channels_left_ends_the_run_and_still_computes() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    pruner = PruneTrain(coefficient=10.0, interval=1).attach(
        model, optimizer, epochs=3, steps_per_epoch=STEPS
    )
    with pytest.raises(NetworkCollapsed, match="no gradient reaches any convolution"):
        train(model, optimizer, pruner, 0, 3 * STEPS)
    assert model(batch(0)[0]).shape == (8, 4)
    assert pruner.density < 0.05


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"penalty_ratio": 1.0}, "penalty_ratio must be at least 0 and below 1"),
        ({"interval": 0}, "interval must be above 0"),
        ({"once_at": 3}, "reconfigure is not 'once'"),
        ({"reconfigure": "once", "once_at": 30}, "the run has 6 epochs"),
        ({"fine_tune": 6}, "leave some"),
        ({"round_to": 0}, "round_to must be at least 1"),
        ({"scheme": "both"}, "scheme must be one of union, gating"),
        ({"exclude": ("nothing",)}, "no layer is called 'nothing'"),
    ],
)
def test_mistakes(settings: dict[str, Any], words: str) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=words):
        PruneTrain(**settings).attach(model, optimizer, epochs=6, steps_per_epoch=STEPS)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten()), r"no channel .* \(0\.weight:1: it is an input"),
        (nn.Sequential(nn.BatchNorm2d(3)), r"no convolution that PruneTrain can prune \(none at all\)"),
    ],
)
def test_a_network_that_cannot_shrink_says_why(model: nn.Module, told: str) -> None:
    optimizer = torch.optim.SGD([*model.parameters()] or [nn.Parameter(torch.ones(()))], lr=0.1)
    with pytest.raises(UserError, match=told):
        PruneTrain().attach(model, optimizer, epochs=4, steps_per_epoch=2, example=torch.zeros(2, 3, 8, 8))
