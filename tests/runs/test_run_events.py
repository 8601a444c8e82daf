"""Typed events: they come back from JSON as they were, and nothing of an unknown one is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from clicktrain.runs import events
from clicktrain.runs.events import ABSENT, Event, HardPruneEvent, OtherEvent, StageEvent, from_json


@pytest.mark.parametrize(
    ("event", "written"),
    [
        (
            StageEvent(stage="pool", number=2, reason="the loss is flat", step=3, epoch=1.5),
            {
                "event": "stage",
                "step": 3,
                "epoch": 1.5,
                "stage": "pool",
                "number": 2,
                "reason": "the loss is flat",
            },
        ),
        (
            HardPruneEvent(compression_asked=None, compression_reached=8.0, energy_outside=0.5),
            {
                "event": "hard_prune",
                "compression_asked": None,
                "compression_reached": 8.0,
                "energy_outside": 0.5,
            },
        ),
        (
            OtherEvent(other="mine", step=1, epoch=0.5, more={"why": [1]}),
            {"event": "mine", "step": 1, "epoch": 0.5, "why": [1]},
        ),
    ],
)
def test_what_is_written_and_read_back(event: Event, written: dict[str, Any]) -> None:
    assert event.to_json() == written
    assert next(iter(event.to_json())) == "event"
    assert from_json(json.loads(json.dumps(written))) == event


@pytest.mark.parametrize(
    "line",
    [
        {"event": "stage", "stage": "pool", "number": 1, "reason": "", "later_key": {"a": None}},
        {"event": "stage", "stage": "pool"},  # without what a stage needs
        {"event": "reconfigured", "measured_ms": None, "seconds": 0.1},
        {"event": "of a later version", "step": 1, "epoch": 2.0, "stage": "x"},
        {"event": "of a later version", "epoch": None},
        {"epoch": 1.0},
        {},
    ],
)
def test_nothing_is_lost(line: dict[str, Any]) -> None:
    assert from_json(line).to_json() == {"event": "None", **line}


def test_a_field_that_is_absent_is_not_null() -> None:
    event = from_json({"event": "reconfigured", "measured_ms": None})
    assert isinstance(event, events.ReconfiguredEvent)
    assert event.measured_ms is None
    assert event.latency_ratio is ABSENT


def test_an_event_keeps_the_time_it_has() -> None:
    stage = StageEvent(stage="pool", number=1, reason="")
    assert stage.at(4, 0.5).at(9, 2.5) == stage.at(4, 0.5)
    assert (stage.at(4, 0.5).step, stage.at(4, 0.5).epoch) == (4, 0.5)


def test_a_kind_of_ones_own_is_read_as_what_it_is() -> None:

    class Thawed(Event, kind="thawed for this test"):
        layers: int

    assert from_json({"event": "thawed for this test", "layers": 2}) == Thawed(layers=2)


@pytest.mark.parametrize("package", ["runs", "report"])
def test_the_folder_of_a_run_is_read_without_torch(package: str) -> None:
    code = (
        f"import sys, pkgutil, importlib, clicktrain.{package} as package\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        "    importlib.import_module(f'{package.__name__}.{module.name}')\n"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
