"""``clicktrain demo``: digits trained dense, with ClickTrain and with one-shot magnitudes, compared."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clicktrain.commands.arguments import QUIET, Command, Option
from clicktrain.commands.progress import make_progress
from clicktrain.commands.screen import lasting_console
from clicktrain.train import RunFolder, TrainingInterrupted, from_dict
from clicktrain.train.fit import fit
from clicktrain.wording import short

RECIPE: Mapping[str, Any] = {
    "model": "resnet20",
    "width": 0.5,
    "data": "digits",
    "epochs": 30,
    "batch_size": 64,
    "schedule": "onecycle",
    "learning_rate": 0.1,
    "label_smoothing": 0.1,
    "checkpoint_every": 10,
    "keep_checkpoints": 1,
    "threads": 1,
}
"""Settings that all runs share. One thread: the tensors are small, and any number of cores gives the same."""

RUNS: Mapping[str, Mapping[str, Any]] = {
    "dense": {"method": "dense"},
    "clicktrain": {"method": "clicktrain", "compression": 8.0},
    "one-shot": {"method": "clicktrain", "preset": "one-shot", "compression": 8.0},
}
"""Folder name of each run and what sets it apart."""

_OPTIONS = (
    Option("out", str, "Folder of the runs; those of an earlier demo are replaced.", "runs/demo",
           metavar="DIR"),
    Option("epochs", int | None, f"Epochs of each run; {RECIPE['epochs']} by default.", metavar="N"),
    replace(QUIET, help="No progress, only the table and the report's path.", main=True),
)  # fmt: skip
COMMAND = Command(
    name="demo",
    description="Train the embedded handwritten digits dense, with ClickTrain and with one-shot magnitudes, "
    "compare them, and write a report: about a minute.",
    groups={"this command": _OPTIONS},
    examples=("clicktrain demo", "clicktrain demo --epochs 5 --out runs/short-demo"),
)


def run_demo(out: Path, console: Console, *, epochs: int | None = None, quiet: bool = False) -> Path:
    """Train every run, print the comparison, write the report; its path.

    ``out`` holds the runs' folders: an earlier demo's are replaced, other files are left alone, and a folder
    that holds something else than a run is a UserError. ``epochs`` of each run replace the recipe's.
    """
    from clicktrain.report import write_report

    summaries = {}
    for number, (name, settings) in enumerate(RUNS.items(), start=1):
        if not quiet:
            console.rule(f"{number}/{len(RUNS)} {name}", align="left")
        length = {} if epochs is None else {"epochs": epochs}
        summaries[name] = _train(out / name, {**RECIPE, **settings, **length}, console, quiet)
    report = write_report([out / name for name in RUNS], out / "report.html")
    console.print(comparison(summaries))
    return report


def _train(path: Path, settings: dict[str, Any], console: Console, quiet: bool) -> Mapping[str, Any]:
    config, method = from_dict(settings)
    folder = RunFolder(path)
    if folder.config.exists():
        shutil.rmtree(path)
    progress = make_progress(console, quiet)
    try:
        return fit(config, method, folder, progress=progress)
    finally:
        if progress is not None:
            progress.close()


def comparison(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per run: accuracy, compression, FLOPs and time. Shares are of the dense network's."""
    table = Table(
        title="Handwritten digits: 1,797 real images of 8x8, a fifth held back for validation",
        caption="One validation image is 0.28 points. Shares are of the dense run. Images of 8x8 leave fast\n"
        "kernels little to do, and the time holds their compilation: README has steps of real size.",
    )
    table.add_column("run")
    heads = (
        "validation\naccuracy",
        "compression\nratio",
        "training\nFLOPs",
        "inference\nFLOPs/image",
        "time",
    )
    for head in heads:
        table.add_column(head, justify="right")
    for name, summary in summaries.items():
        table.add_row(
            name,
            f"{summary['val_accuracy']:.1f}%",
            f"{summary['compression_ratio']:.2f}x",
            _flops(summary["train_flops"], summary["train_flops_ratio"]),
            _flops(summary["inference_flops"], summary["inference_flops_ratio"]),
            f"{summary['train_seconds']:.0f} s",
        )
    return table


def _flops(count: float, share: float) -> str:
    return f"{short(count, ' ')} ({100 * share:.0f}%)"


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = {option.name: option.default for option in _OPTIONS} | COMMAND.parse(argv)
    out = Path(given["out"])
    console = lasting_console(f"the runs go on without it, in {out}")
    started = time.monotonic()
    try:
        report = run_demo(out, console, epochs=given["epochs"], quiet=given["quiet"])
    except TrainingInterrupted as stop:
        print(f"clicktrain: {stop}", file=sys.stderr)
        return stop.exit_code
    line = f"{len(RUNS)} runs in {time.monotonic() - started:.0f} s. Report: {report.resolve()}"
    console.print(line, highlight=False, soft_wrap=True)
    return 0
