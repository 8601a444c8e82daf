"""``clicktrain frontier``: trains a grid, killed and resumed; its time model against the clock."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_runs import DATA, call, spawn

from clicktrain.bench.frontier import worker
from clicktrain.bench.frontier.lines import finished_line, read_lines
from clicktrain.bench.frontier.points import points_of, run_seconds
from clicktrain.bench.frontier.recipe import parse_recipe
from clicktrain.bench.frontier.timing import TimingSettings, measure_times
from clicktrain.errors import NetworkCollapsed
from clicktrain.runs.folder import RunFolder
from clicktrain.train.fit import fit
from clicktrain.train.progress import Silent

RECIPE: dict[str, Any] = {
    "family": "tiny",
    "base": {"model": "resnet20", "data": DATA, "batch_size": 32, "learning_rate": 0.01},
    "dense": {"width": 0.25, "epochs": [1, 24]},
    "pruned": [
        # Packed, a network would be planned, which takes longer than the run.
        {"method": "gmp", "setting": "gmp", "width": 0.25, "epochs": 4,
         "settings": {"sparsity": 0.5, "packed": False, "operators": "density"}},
    ],
    "engines": ["fp32"],
}  # fmt: skip


def wait_for(there: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not there.exists() or not there.stat().st_size:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_grid_goes_on_where_it_was_killed(number: int, place: Path) -> None:
    (place / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    command = ("frontier", "recipe.yaml", "--out", "runs", "--only", "dense*")
    process = spawn(*command, cwd=place)
    long = place / "runs" / "dense-w0.25-e24" / "seed-0"
    wait_for(long / "metrics.jsonl", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL), out + err
    results = place / "runs" / "results.jsonl"
    assert [key[0] for key in read_lines(results)] == ["dense-w0.25-e1"]
    # A killed process takes its runs along: the next one finds their folders free.
    end = time.monotonic() + 60
    while RunFolder(long).user is not None:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert not (long / "summary.json").exists()
    before = (place / "runs" / "dense-w0.25-e1" / "seed-0" / "summary.json").stat().st_mtime_ns
    again = call(*command, "--json", "points.json")
    assert again.code == 0, again.err
    assert "dense-w0.25-e1/seed-0: begins" not in again.out
    assert before == (place / "runs" / "dense-w0.25-e1" / "seed-0" / "summary.json").stat().st_mtime_ns
    epochs = [json.loads(text)["epoch"] for text in (long / "metrics.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, 25))
    assert len(results.read_text().splitlines()) == 2
    points = json.loads((place / "points.json").read_text())["points"]
    assert [(p["name"], p["seeds"]) for p in points] == [("dense-w0.25-e1", 1), ("dense-w0.25-e24", 1)]
    assert (place / "runs" / "frontier.md").read_text().count("\n| dense-") == 2
    assert call(*command).out.count("begins") == 0


def test_a_dry_run_lists_the_runs_and_writes_nothing(place: Path) -> None:
    (place / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "seeds": [3, 4]}))
    outcome = call("frontier", "recipe.yaml", "--dry-run", "--only", "dense-w0.25-e1", "gmp*/seed-4")
    assert outcome.code == 0, outcome.err
    names = [line.split()[-1] for line in outcome.out.splitlines()[:-1]]
    assert sorted(names) == ["dense-w0.25-e1/seed-3", "dense-w0.25-e1/seed-4", "gmp-w0.25-e4/seed-4"]
    assert "3 runs" in outcome.out
    assert sorted(path.name for path in place.iterdir()) == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("recipe.yaml", "--jobs", "0"), "jobs is 0: must be at least 1"),
        (("recipe.yaml", "--only", "nobody"), "no run is called 'nobody'"),
        (("recipe.yaml", "--time"), "no run is finished yet"),
        (("nothing.yaml",), "there is no file nothing.yaml"),
        ((), "RECIPE is missing"),
    ],
)
def test_a_mistake_is_one_sentence(words: tuple[str, ...], sentence: str, place: Path) -> None:
    (place / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    outcome = call("frontier", *words)
    assert outcome.code == 2
    assert sentence in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_run_that_collapses_is_a_line_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = parse_recipe(RECIPE, "").cell("gmp-w0.25-e4")

    def broken(*_: Any, **__: Any) -> None:
        raise NetworkCollapsed("the network has collapsed in epoch 1; prune less")

    monkeypatch.setattr(worker, "fit", broken)
    line = worker.run_job(worker.job_text(cell, 0, tmp_path / "run", None))
    assert (line["status"], line["reason"]) == ("failed", "the network has collapsed in epoch 1")


def test_a_folder_with_another_run_is_not_taken(tmp_path: Path) -> None:
    recipe = parse_recipe(RECIPE, "")
    fit(*recipe.cell("dense-w0.25-e1").config(0), tmp_path / "run")
    with pytest.raises(ValueError, match="another epochs"):
        worker.run_job(worker.job_text(recipe.cell("dense-w0.25-e24"), 0, tmp_path / "run", None))


class Watch(Silent):
    """CPU time of the training thread when training begins, and at the end of the last epoch so far."""

    began = ended = 0.0

    def start(self, *_: Any) -> None:
        self.began = time.thread_time()

    def epoch(self, *_: Any) -> None:
        self.ended = time.thread_time()


@pytest.mark.long
def test_the_time_that_is_put_together_is_about_what_the_clock_says(tmp_path: Path) -> None:
    """By CPU time, as other programs run beside the tests; within a factor of 3, as checkpoints count too.

    The shorter of two runs: what is loaded and built once in a process is not in the second.
    """
    recipe = parse_recipe(RECIPE, "")
    lines, clock = {}, {}
    for name in ("dense-w0.25-e24", "gmp-w0.25-e4"):
        cell = recipe.cell(name)
        spent = []
        for folder in (tmp_path / "first" / name, tmp_path / "second" / name):
            watch = Watch()
            fit(*cell.config(0), folder, progress=watch)
            spent.append(watch.ended - watch.began)
        clock[name] = min(spent)
        lines[name, 0] = finished_line(cell, 0, RunFolder(folder))
    times = measure_times(recipe, lines, TimingSettings(rounds=3, alone=False))
    for point in points_of(recipe, lines, times):
        assert point.train_seconds is not None
        assert clock[point.name] / 3 < point.train_seconds < 3 * clock[point.name]
        assert point.latency_ms_b64 is not None
        assert point.latency_ms_b1 is not None
    figures = times["networks"]["gmp-w0.25-e4"]
    assert sum(row["steps"] for row in figures["stages"]["pruning"]) > 10
    line = lines["gmp-w0.25-e4", 0]
    assert {phase["stage"] for phase in line["phases"]} == {"dense", "pruning", "fixed"}
    slow = {**figures, "step_ms": 100 * figures["step_ms"]}
    dense = times["networks"][next(key for key in times["networks"] if key.startswith("resnet20"))]
    assert (run_seconds(line, dense, slow) or 0) > 2 * (run_seconds(line, dense, figures) or 0)
