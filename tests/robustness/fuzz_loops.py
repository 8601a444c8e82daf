"""Misuse of a method in somebody's own loop: each is refused at attach, at observe or at finish."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import Case, Expected
from torch import nn

import clicktrain

METHODS: tuple[Callable[[], Any], ...] = (
    lambda: clicktrain.ClickTrain(compression=4), lambda: clicktrain.PruneTrain(), lambda: clicktrain.RigL(),
    lambda: clicktrain.Campfire(sparsity=0.5), lambda: clicktrain.PaT(), lambda: clicktrain.DSR(),
)  # fmt: skip


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def _train(
    model: Any, optimizer: Any, pruner: Any, epochs: int = 8, loss_of: Any = None, step: bool = True
) -> Any:
    generator = torch.Generator().manual_seed(1)
    for _ in range(epochs * 3):
        x = torch.randn(8, 1, 8, 8, generator=generator)
        y = torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss = loss if loss_of is None else loss_of(loss)
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            loss.backward()
        pruner.observe(loss)
        if step:
            optimizer.step()
    return pruner.finish()


def _attached(method: Any, **options: Any) -> tuple[Any, Any, Any]:
    model = _network()
    optimizer = _sgd(model)
    settings = {"epochs": 8, "steps_per_epoch": 3, "example": torch.zeros(1, 1, 8, 8), **options}
    return model, optimizer, method.attach(model, optimizer, **settings)


def _options(name: str, value: Any) -> Callable[[Any], None]:
    return lambda method: _train(*_attached(method, **{name: value}))


def _loss(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda method: _train(*_attached(method), loss_of=change)


def _attach(*arguments: Any) -> Callable[[Any], None]:
    def act(method: Any) -> None:
        values = [value() if callable(value) else value for value in arguments]
        method.attach(*values, epochs=8, steps_per_epoch=3)

    return act


def _foreign_optimizer(method: Any) -> None:
    method.attach(_network(), _sgd(_network()), epochs=8, steps_per_epoch=3, example=torch.zeros(1, 1, 8, 8))


def _twice(method: Any) -> None:
    model, optimizer, _ = _attached(method)
    method.attach(model, optimizer, epochs=8, steps_per_epoch=3, example=torch.zeros(1, 1, 8, 8))


def _finish_twice(method: Any) -> None:
    model, optimizer, pruner = _attached(method)
    _train(model, optimizer, pruner)
    pruner.finish()


def _after_finish(method: Any) -> None:
    model, optimizer, pruner = _attached(method)
    _train(model, optimizer, pruner)
    pruner.observe(torch.tensor(1.0))


def _never_observed(method: Any) -> None:
    _, _, pruner = _attached(method)
    pruner.finish()


def _correct(method: Any) -> None:
    found = _train(*_attached(method))
    assert isinstance(found, nn.Module)
    assert found(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


MISUSES: dict[str, tuple[Callable[[Any], None], Expected]] = {
    "nothing wrong": (_correct, "accepted"),
    "epochs 0": (_options("epochs", 0), "refused"), "epochs -1": (_options("epochs", -1), "refused"),
    "epochs 1.5": (_options("epochs", 1.5), "refused"), "epochs text": (_options("epochs", "8"), "refused"),
    "epochs None": (_options("epochs", None), "refused"), "epochs nan": (_options("epochs", float("nan")),
    "refused"),
    "steps 0": (_options("steps_per_epoch", 0), "refused"), "steps text": (_options("steps_per_epoch", "3"),
    "refused"),
    "steps 2.5": (_options("steps_per_epoch", 2.5), "refused"), "epochs True": (_options("epochs", True),
    "either"),
    "example text": (_options("example", "x"), "refused"), "example of another shape": (
        _options("example", torch.zeros(1, 3, 8, 8)), "either"),
    "no model": (_attach(None, lambda: _sgd(_network())), "refused"), "no optimizer": (_attach(_network,
    None), "refused"),
    "optimizer for model": (_attach(lambda: _sgd(_network()), _network), "refused"),
    "an empty model": (_attach(nn.Sequential, lambda: _sgd(_network())), "refused"),
    "a linear model": (_attach(lambda: nn.Linear(2, 2), lambda: _sgd(_network())), "refused"),
    "an optimizer of another network": (_foreign_optimizer, "either"), "attached twice": (_twice, "either"),
    "finished twice": (_finish_twice, "either"), "observed after finish": (_after_finish, "either"),
    "never observed": (_never_observed, "either"),
    "loss nan": (_loss(lambda loss: loss * float("nan")), "either"),
    "loss inf": (_loss(lambda loss: loss / 0), "either"),
    "loss None": (_loss(lambda loss: None), "either"), "loss text": (_loss(lambda loss: "x"), "either"),
    "loss a number": (_loss(lambda loss: loss.item()), "either"),
    "loss per image": (_loss(lambda loss: loss.expand(8).clone().sum()[None]), "either"),
    "no step": (lambda method: _train(*_attached(method), step=False), "either"),
}  # fmt: skip


def cases(rng: random.Random, count: int) -> list[Case]:
    """Every misuse of some method."""
    pairs = [(name, number) for name in MISUSES for number in range(len(METHODS))]
    rng.shuffle(pairs)
    return [_case(name, number) for name, number in pairs[:count]]


def _case(name: str, number: int) -> Case:
    act, expected = MISUSES[name]

    def run(place: Path) -> None:
        act(METHODS[number]())

    return Case("own loops", f"{name}, {METHODS[number]().__class__.__name__}", run, expected)
