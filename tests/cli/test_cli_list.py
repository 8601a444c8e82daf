from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from cli_runs import Outcome, call

HEADER = "# clicktrain run folder, format 4\n"


def begun(folder: Path, epochs: int = 10, accuracy: float | None = 40.0) -> Path:
    """The folder of a run that was stopped after an epoch."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"{HEADER}model: resnet20\ndata: digits\nmethod: dense\nepochs: {epochs}\n"
    )
    line = {"epoch": 1, "val_accuracy": accuracy, "density": 0.5, "train_flops": 50, "train_flops_dense": 100,
            "seconds": 3.0}  # fmt: skip
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def test_runs_with_their_figures(finished: tuple[Path, Outcome], place: Path) -> None:
    (place / "runs" / "a").mkdir(parents=True)
    (place / "runs" / "a" / "done").symlink_to(finished[0])
    begun(place / "runs" / "b" / "stopped")
    begun(place / "runs" / "broken")
    (place / "runs" / "broken" / "config.yaml").write_text("[")
    found = {row["run"]: row for row in json.loads(call("list", "--json").out)}
    assert list(found) == ["runs/b/stopped", "runs/broken"]  # links are not followed
    stopped = found["runs/b/stopped"]
    assert stopped["state"] == "stopped"
    assert (stopped["epochs_done"], stopped["epochs"]) == (1, 10)
    assert (stopped["accuracy"], stopped["compression"], stopped["train_flops_ratio"]) == (40.0, 2.0, 0.5)
    assert found["runs/broken"]["state"] == "damaged"
    summary = json.loads((finished[0] / "summary.json").read_text())
    (done,) = json.loads(call("list", finished[0], "--json").out)
    assert done["state"] == "finished"
    assert done["accuracy"] == summary["val_accuracy"]
    assert done["compression"] == summary["compression_ratio"]
    assert done["inference_flops_ratio"] == summary["inference_flops_ratio"]
    text = call("list", finished[0], "runs", "runs/b").out
    assert len(re.findall(r"stopped +1/10", text)) == 1  # each run once
    assert re.search(rf"{summary['val_accuracy']:.2f}% +{summary['compression_ratio']:.2f}x", text)
    assert "runs/broken" in text


def test_order_and_choice(finished: tuple[Path, Outcome], place: Path) -> None:
    begun(place / "runs" / "low", accuracy=1.0)
    begun(place / "runs" / "high", accuracy=99.0)
    begun(place / "runs" / "unknown", accuracy=None)

    def names(*flags: str) -> list[str]:
        return [Path(row["run"]).name for row in json.loads(call("list", "runs", "--json", *flags).out)]

    assert names() == ["high", "low", "unknown"]
    assert names("--sort", "accuracy") == ["high", "low", "unknown"]
    assert names("--sort", "date")[0] == "unknown"
    assert names("--finished") == []
    assert call("list", "--finished").out == "no runs in runs\n"
    assert "there is no folder nowhere" in call("list", "nowhere").err


def test_listing_needs_no_torch(finished: tuple[Path, Outcome], repository: Path) -> None:
    code = (
        f"import sys; from clicktrain.cli import main; assert main(['list', {str(finished[0])!r}]) == 0; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
