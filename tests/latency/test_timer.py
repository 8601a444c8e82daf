"""Interleaved timing within a time limit: hopeless candidates, the clock, and where measurements are kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clicktrain.latency.machine import Machine
from clicktrain.latency.tables import keep_table, read_table, table_path
from clicktrain.latency.timer import candidates_ms, timed_for

CPU = torch.device("cpu")


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


def test_a_measurement_is_kept_per_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table_path("layer", [1, "conv"], CPU, tmp_path)
    assert path is not None
    assert read_table(path) is None
    keep_table(path, {"ms": [1.0]})
    assert read_table(path) == {"ms": [1.0]}
    assert table_path("layer", [2, "conv"], CPU, tmp_path) != path
    for damaged in ("[1]", "{", "[" * 100_000):
        path.write_text(damaged)
        assert read_table(path) is None
    here = Machine.here()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert Machine.here() != here
        assert table_path("layer", [1, "conv"], CPU, tmp_path) != path
    finally:
        torch.set_num_threads(threads)


def test_without_a_home_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for variable in ("XDG_CACHE_HOME", "CLICKTRAIN_LATENCY_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    assert table_path("layer", [], CPU) is None
    keep_table(None, {})
    assert read_table(None) is None
