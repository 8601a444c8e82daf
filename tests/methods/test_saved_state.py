"""States of methods survive being saved, whatever they hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clicktrain.methods.saved_state import restored_state, saved_state


class Form(NamedTuple):
    shape: tuple[int, ...]
    dtype: str | None = None


@dataclass
class Inner:
    share: float = 1.0
    held: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class State:
    stage: str = "dense"
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    form: Form | None = None
    series: list[list[int]] = field(default_factory=list)
    window: tuple[int, int] = (0, 0)
    forms: dict[tuple[int, int], Form] = field(default_factory=dict)
    view: Any = field(default=None, compare=False)


def test_a_state_comes_back_as_it_was() -> None:
    mask = torch.tensor([True, False])
    inner = Inner(0.5, {"conv:0": mask})
    state = State(
        "prune", inner, Inner(0.25), Form((2, 3)), [[1, 2], [3]], (4, 5), {(3, 5): Form((1,))}, view=object()
    )
    saved = saved_state(state)
    assert "view" not in saved
    assert list(saved["forms"]) == ["3x5"], "a key of a file is text"
    back = restored_state(State, saved)
    assert torch.equal(back.inner.held["conv:0"], mask)
    assert back.inner.held["conv:0"] is not mask, "a copy"
    back.inner.held = state.inner.held
    assert back == state
    assert isinstance(back.form, Form)
    assert back.window == (4, 5)
    assert back.view is None


def test_saving_copies_what_can_change() -> None:
    state = State(series=[[1]])
    saved = saved_state(state)
    state.series[0].append(2)
    state.inner.share = 0.1
    assert saved["series"] == [[1]]
    assert saved["inner"]["share"] == 1.0
    assert restored_state(State, saved).maybe is None


def test_tensors_come_back_on_the_device_that_is_asked_for() -> None:
    saved = saved_state(State(inner=Inner(0.5, {"conv": torch.ones(2)})))
    assert restored_state(State, saved, "meta").inner.held["conv"].is_meta
