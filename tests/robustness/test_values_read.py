"""A forward reads values from wherever Python has them; accelerated, it follows every change of them."""

from __future__ import annotations

import argparse
import contextvars
import copy
import functools
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from frozen_kinds import Middle, Net
from torch import Tensor, nn

from clicktrain.compiler import accelerate
from clicktrain.errors import UserError
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.pack_model import pack_model_

pytestmark = pytest.mark.skipif(toolchain() is None, reason="needs a C compiler")


@dataclass(slots=True)
class Slots:
    alpha: float = 1.0


class Reader(Middle):
    factors: list[Tensor]
    partial: Any
    deep: Any

    @staticmethod
    def scale(x: Tensor) -> Tensor:
        return x


class Own:
    level = 1.0

    def __init__(self) -> None:
        self.alpha = 1.0

    @property
    def both(self) -> float:
        return self.alpha * self.level

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.both


def scaled(x: Tensor, by: list[float] = [1.0]) -> Tensor:  # noqa: B006
    return x * by[0]


def counted(x: Tensor) -> Tensor:
    return x * counted.alpha  # type: ignore[attr-defined]


def enclosed() -> tuple[Callable[[Tensor], Tensor], Callable[[float], None]]:
    alpha = 1.0

    def set_alpha(value: float) -> None:
        nonlocal alpha
        alpha = value

    return lambda x: x * alpha, set_alpha


ARGUMENTS = argparse.Namespace(alpha=1.0, model=SimpleNamespace(alpha=1.0))
CONFIG: dict[str, Any] = {"act": torch.relu, "deep": [{"alpha": 1.0}, object()]}
MANY = dict.fromkeys(range(200), 1.0)
SLOTS, OWN, LOCAL = Slots(), Own(), threading.local()
VARIABLE = contextvars.ContextVar("alpha", default=1.0)
FACTOR = torch.ones((), dtype=torch.float64)
BY_ENCLOSED, SET_ENCLOSED = enclosed()
LOCAL.alpha = counted.alpha = 1.0  # type: ignore[attr-defined]
os.environ["CLICKTRAIN_TEST_ALPHA"] = "1.0"


def everything(m: Any, x: Tensor) -> Any:
    """Reads one value in each way."""
    x = scaled(counted(OWN(BY_ENCLOSED(m.c(x)))))
    x = x * ARGUMENTS.alpha * ARGUMENTS.model.alpha * CONFIG["deep"][0]["alpha"] * MANY[150]
    x = x * SLOTS.alpha * LOCAL.alpha * VARIABLE.get() * FACTOR * float(os.environ["CLICKTRAIN_TEST_ALPHA"])
    for factor in m.factors:
        x = x * factor
    return m.scale(m.partial(x)) * m.deep.model["alpha"]


@pytest.fixture
def pair() -> tuple[Any, Any]:
    """An accelerated network and the plain one, on a graph as a whole."""
    torch.manual_seed(0)
    model = Net(everything).double()
    model.middle = middle = Reader(everything).double()
    middle.factors = [torch.ones((), dtype=torch.float64)]
    middle.partial = functools.partial(torch.mul, other=1.0)
    middle.deep = SimpleNamespace(model={"alpha": 1.0, "name": object()})
    pack_model_(model, {"middle.c": torch.rand(8, 8, 3, 3) < 0.3})
    return accelerate(model, images(), rule="sparse", remember=False), copy.deepcopy(model)


def images() -> Tensor:
    return torch.randn(3, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


HERE = globals()
PLACES: dict[str, Callable[[Any, pytest.MonkeyPatch], Any]] = {
    "namespace": lambda m, patch: patch.setattr(ARGUMENTS, "alpha", 2.0),
    "namespace inside": lambda m, patch: patch.setattr(ARGUMENTS.model, "alpha", 2.0),
    "dict in a list": lambda m, patch: patch.setitem(CONFIG["deep"][0], "alpha", 2.0),
    "large dict": lambda m, patch: patch.setitem(MANY, 150, 2.0),
    "slot": lambda m, patch: patch.setattr(SLOTS, "alpha", 2.0),
    "object": lambda m, patch: patch.setattr(OWN, "alpha", 2.0),
    "class of an object": lambda m, patch: patch.setattr(Own, "level", 2.0),
    "hidden class attribute": lambda m, patch: patch.setattr(OWN, "level", 2.0),
    "property of a class": lambda m, patch: patch.setattr(Own, "both", 2.0),
    "thread's own": lambda m, patch: patch.setattr(LOCAL, "alpha", 2.0),
    "context variable": lambda m, patch: VARIABLE.set(2.0),
    "environment": lambda m, patch: patch.setenv("CLICKTRAIN_TEST_ALPHA", "2.0"),
    "another tensor": lambda m, patch: patch.setitem(HERE, "FACTOR", FACTOR * 2),
    "enclosing function": lambda m, patch: SET_ENCLOSED(2.0),
    "default": lambda m, patch: patch.setattr(scaled, "__defaults__", ([2.0],)),
    "attribute of a function": lambda m, patch: patch.setattr(counted, "alpha", 2.0),
    "another function": lambda m, patch: patch.setitem(HERE, "scaled", lambda x: 2 * x),
    "tensor in a list": lambda m, patch: m.factors.append(torch.full((), 2.0, dtype=torch.float64)),
    "argument of a partial": lambda m, patch: m.partial.keywords.update(other=2.0),
    "dict in a namespace": lambda m, patch: m.deep.model.update(alpha=2.0),
    "method of the layer": lambda m, patch: setattr(m, "scale", lambda x: 2 * x),
    "method of its class": lambda m, patch: patch.setattr(type(m), "scale", staticmethod(lambda x: 2 * x)),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_change_is_followed(pair: tuple[Any, Any], place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, plain = pair
    x = images()
    before = fast(x)
    torch.testing.assert_close(before, plain(x))
    change = PLACES[place]
    try:
        change(fast.base.middle, monkeypatch)
        change(plain.middle, monkeypatch)
        torch.testing.assert_close(fast(x), plain(x))
        assert not torch.allclose(fast(x), before)
    finally:
        SET_ENCLOSED(1.0)
        VARIABLE.set(1.0)


def test_values_that_stay_lower_once(pair: tuple[Any, Any]) -> None:
    fast, plain = pair
    for _ in range(8):  # more than a value may change before its reader is left out
        torch.testing.assert_close(fast(images()), plain(images()))
    assert [len(variants) for variants in fast._lowered.values()] == [1]
    assert "self.base.middle(" not in fast.graph(images()).code


@dataclass(slots=True)
class Result:
    logits: Tensor
    weights: Slots


def test_settings_and_results_may_be_dataclasses_with_slots() -> None:
    torch.manual_seed(0)
    model = Net(lambda m, x: m.c(x) * m.config.alpha).double()
    model.middle.config = Slots()  # type: ignore[assignment]
    pack_model_(model, {"middle.c": torch.rand(8, 8, 3, 3) < 0.3})
    model.register_forward_hook(lambda _, inputs, output: Result(output, Slots()))
    plain = copy.deepcopy(model)
    fast: Any = accelerate(model, images(), rule="sparse", remember=False)
    torch.testing.assert_close(fast(images()).logits, plain(images()).logits)
    model.middle.config.alpha = plain.middle.config.alpha = 3.0
    torch.testing.assert_close(fast(images()).logits, plain(images()).logits)


def test_a_part_that_is_accelerated_already(pair: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match=r"^0 is accelerated already: .*, with 0\.base there$"):
        accelerate(nn.Sequential(pair[0], nn.Linear(5, 2).double()), images(), rule="sparse")
    whole = nn.Sequential(pair[0].base, nn.Linear(5, 2).double())
    accelerate(whole, images(), rule="sparse", remember=False)
