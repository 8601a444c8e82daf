"""The demo as a person runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clicktrain import cli
from clicktrain.commands import demo


def run_demo(repository: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clicktrain", "demo", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=repository,
        env={**os.environ, "COLUMNS": "120", **environment},
    )


def summaries(folder: Path) -> dict[str, dict]:
    return {name: json.loads((folder / name / "summary.json").read_text()) for name in demo.RUNS}


@pytest.mark.long
def test_a_short_demo_compares_the_runs_and_writes_a_report(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = run_demo(repository, "--epochs", "3", "--out", str(out), "--quiet")
    assert done.returncode == 0, done.stderr
    reached = summaries(out)
    assert reached["dense"]["compression_ratio"] == pytest.approx(1.0, abs=0.01)
    for name in ("clicktrain", "one-shot"):
        assert reached[name]["compression_ratio"] == pytest.approx(8.0, rel=0.01)
        assert reached[name]["inference_flops"] < 0.3 * reached["dense"]["inference_flops"]
        assert reached[name]["train_flops_ratio"] < 1.0
    rows = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if line.count("│") == 7}
    assert set(demo.RUNS) <= set(rows)
    for name, summary in reached.items():
        assert f"{summary['val_accuracy']:.1f}%" in rows[name]
        assert f"{summary['compression_ratio']:.2f}x" in rows[name]
    report = Path(re.search(r"Report: (.+)", done.stdout).group(1))
    assert report.stat().st_size > 10_000
    assert all(name in report.read_text(encoding="utf-8") for name in demo.RUNS)


def test_a_second_demo_replaces_the_first_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "RUNS", {"dense": demo.RUNS["dense"]})
    monkeypatch.setattr(demo, "RECIPE", {**demo.RECIPE, "width": 0.125})
    (tmp_path / "mine.txt").write_text("keep me")
    for epochs in ("2", "1"):
        assert cli.main(["demo", "--epochs", epochs, "--out", str(tmp_path), "--quiet"]) == 0
        assert len((tmp_path / "dense" / "metrics.jsonl").read_text().splitlines()) == int(epochs)
    assert (tmp_path / "mine.txt").read_text() == "keep me"
    capsys.readouterr()
    (tmp_path / "dense" / "config.yaml").unlink()
    assert cli.main(["demo", "--epochs", "1", "--out", str(tmp_path), "--quiet"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert (tmp_path / "dense" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_whole_demo_is_accurate_and_takes_less_than_three_minutes(
    repository: Path, tmp_path: Path
) -> None:
    out = tmp_path / "demo"
    started = time.monotonic()
    done = run_demo(repository, "--out", str(out), OMP_NUM_THREADS="2")
    seconds = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    reached = summaries(out)
    assert reached["dense"]["val_accuracy"] >= 97
    assert reached["clicktrain"]["val_accuracy"] >= 97
    assert seconds < 180
