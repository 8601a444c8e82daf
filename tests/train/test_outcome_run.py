"""What a run of the trainer tells at its end, and that a run which went wrong does not look like success."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import short_runs as runs
from safetensors.torch import load_file

from clicktrain import cli
from clicktrain.accounting.cost import ratio
from clicktrain.errors import NetworkCollapsed
from clicktrain.report import write_report
from clicktrain.train import RunFolder

TINY: dict[str, Any] = {"model": "tiny_networks:tiny", "threads": 1, "operators": "reference"}
TARGET = {**TINY, "method": "prunetrain", "epochs": 5, "learning_rate": 0.05}


def command_line(path: Path, *flags: str) -> list[str]:
    where = ["--data", "digits", "--model", "tiny_networks:tiny", "--out", str(path)]
    return ["train", *where, "--threads", "1", "--operators", "reference", *flags]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outcome") / "run"
    runs.run(path, TARGET)
    return path


def test_the_default_target_in_summary_events_and_report(pruned: Path, tmp_path: Path) -> None:
    summary = RunFolder(pruned).summary()
    assert summary is not None
    (row,) = summary["outcome"]
    assert (row["what"], row["asked"], row["missed"]) == ("inference FLOPs left", 0.6, False)
    assert row["reached"] == pytest.approx(summary["inference_flops_ratio"])
    assert summary["warnings"] == []
    (event,) = [e for e in RunFolder(pruned).read_events() if e["event"] == "outcome"]
    assert event["targets"] == summary["outcome"]
    weights = load_file(pruned / "model.safetensors")
    assert summary["nonzero_conv_weights"] == sum(
        int(w.count_nonzero()) for w in weights.values() if w.dim() == 4
    )
    assert summary["channels_removed"] > 0
    page = write_report([pruned], tmp_path / "page.html").read_text()
    assert "Asked and reached" in page
    assert "missed by more than" not in page


def test_the_best_accuracy_is_of_the_pruned_network(pruned: Path) -> None:
    folder = RunFolder(pruned)
    summary, metrics = folder.summary(), folder.read_metrics()
    assert summary is not None
    last = max(
        e["epoch"] for e in folder.read_events()
        if e["event"] == "reconfigured" and e["channels_before"] > e["channels_after"]
    )  # fmt: skip
    after = [line["val_accuracy"] for line in metrics if line["epoch"] >= last]
    assert summary["best_val_accuracy"] == max(after)


def test_a_run_that_goes_on_has_the_same_end(pruned: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(runs.Killed):
        runs.run(path, TARGET, runs.At(2 * runs.BATCHES + 4, runs.kill))
    runs.resume(path)
    runs.assert_same_run(pruned, path)


def test_a_miss_is_a_warning_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    flags = ("--method", "campfire", "--granularity", "window", "--sparsity", "0.5", "--epochs", "3")
    assert cli.main(command_line(path, *flags, "--linear", "none", "--quiet")) == 0
    told = capsys.readouterr().out
    assert "warning: sparsity of the pruned layers: asked 50.0%, reached 55.6%" in told
    summary = json.loads((path / "summary.json").read_text())
    (row,) = summary["outcome"]
    assert row["missed"]
    assert len(summary["warnings"]) == 1
    assert "missed by more than 5%" in (path / "report.html").read_text()


def test_a_collapsed_network_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**TINY, "method": "prunetrain", "penalty_ratio": 0.999, "floor": 0.0}
    settings |= {"epochs": 4, "learning_rate": 0.1}
    with pytest.raises(NetworkCollapsed, match=r"collapsed in epoch .*the last checkpoint is .*step-0"):
        runs.run(tmp_path / "run", settings)
    assert not (tmp_path / "run" / "summary.json").exists()
    flags = ("--method", "prunetrain", "--penalty-ratio", "0.999", "--floor", "0", "--epochs", "4")
    assert cli.main(command_line(tmp_path / "again", *flags, "--quiet")) == 2
    assert "the network has collapsed" in capsys.readouterr().err


def test_what_cannot_be_is_known_before_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in (
        (("--method", "prunetrain", "--target-flops", "0.01"), "asks for 0.01 of the inference FLOPs"),
        (("--method", "clicktrain", "--compression", "500"), "compression 500 cannot be met"),
        (("--method", "campfire", "--exclude", "3", "7"), "no convolution that Campfire can prune"),
    ):
        assert cli.main(command_line(tmp_path / "run", *flags, "--dry-run")) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_ratio_is_a_number() -> None:
    assert ratio(99_982, 0) == 99_982
    assert ratio(0, 0) == 1.0
    assert ratio(9, 3) == 3.0
