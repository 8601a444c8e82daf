"""Interleaved timing within a time limit: hopeless candidates, the clock, and where measurements are kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from clicktrain.latency.machine import Machine, measured_once
from clicktrain.latency.timer import candidates_ms, timed_for

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Milliseconds:
    ms: float


def test_a_hopeless_candidate_is_called_once() -> None:
    calls: dict[str, int] = {}

    def spin(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            calls[name] = calls.get(name, 0) + 1
            end = time.thread_time() + seconds
            while time.thread_time() < end:
                pass

        return call

    seconds = {"quick": 0.005, "slow": 0.15, "slow and alone": 0.15, "not much slower": 0.02}
    functions = {name: spin(name, wanted) for name, wanted in seconds.items()}
    rivals = dict.fromkeys(("quick", "slow", "not much slower"), "one") | {"slow and alone": "other"}
    ms = candidates_ms(functions, 0.01, rivals=rivals)
    assert calls == {"quick": 3, "slow": 1, "slow and alone": 3, "not much slower": 3}
    assert ms["slow"] > ms["not much slower"] > ms["quick"]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 2), (8.5, 4), (100.0, 6)])
def test_rounds_follow_the_time_that_is_given(seconds: float, rounds: int) -> None:
    ticks = iter(range(1000))
    times = timed_for({"one": lambda: None}, seconds, (2, 6), clock=lambda: float(next(ticks)))
    # Every look at this clock takes a second: two per timing, and one per comparison with the limit.
    assert times == {"one": [1000.0] * rounds}


def measured(about: object, ms: float, folder: Path | None) -> float:
    return measured_once(
        "layer", about, CPU, lambda document: Milliseconds(document["ms"]), lambda: Milliseconds(ms), folder
    ).ms


def test_a_measurement_is_kept_per_machine(tmp_path: Path) -> None:
    assert measured([1, "conv"], 1.0, tmp_path) == 1.0
    assert measured([1, "conv"], 2.0, tmp_path) == 1.0
    assert measured([2, "conv"], 2.0, tmp_path) == 2.0
    here, threads = Machine.here(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert Machine.here() != here
        assert measured([1, "conv"], 3.0, tmp_path) == 3.0
    finally:
        torch.set_num_threads(threads)


def test_without_a_home_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for variable in ("XDG_CACHE_HOME", "CLICKTRAIN_LATENCY_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    assert [measured([], ms, None) for ms in (1.0, 2.0)] == [1.0, 2.0]
