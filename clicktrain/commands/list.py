"""``clicktrain list [FOLDER...]``: the runs in folders with their figures, finished or not. Free of torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from clicktrain.commands.arguments import JSON, Command, Option, Positional
from clicktrain.errors import UserError
from clicktrain.wording import short_duration, table_lines

DEFAULT = "runs"
"""Where runs are without --out."""

Order = Literal["name", "accuracy", "compression", "time", "date"]
_OPTIONS = (
    Option("sort", Order, "Order of the runs; those without the figure come last.", "name"),
    Option("finished", bool, "Only finished runs.", False),
    JSON,
)
COMMAND = Command(
    name="list",
    description="The runs below folders, one a line: state, accuracy, compression, training and inference "
    "FLOPs, time. Of a run that goes on, the figures so far.",
    positional=Positional("folders", f"Where to look; {DEFAULT} by default.", many=True, optional=True),
    groups={"this command": _OPTIONS},
    examples=(
        "clicktrain list",
        "clicktrain list runs/sweep --sort accuracy --finished",
        "clicktrain list runs --json",
    ),
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = {option.name: option.default for option in _OPTIONS} | COMMAND.parse(argv)
    folders = [Path(text) for text in given["folders"] or [DEFAULT]]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}: give the folder that your runs are in")
    rows = [describe(folder) for folder in runs_below(folders)]
    if given["finished"]:
        rows = [row for row in rows if row["state"] == "finished"]
    rows.sort(key=_ORDERS[given["sort"]])
    if given["json"]:
        print(json.dumps(rows, indent=2))
    elif rows:
        print("\n".join(table_lines([_HEAD, *map(_cells, rows)])))
        for row in rows:
            if row["problem"] is not None:
                print(f"{row['run']}: {row['problem']}")
    else:
        print(f"no runs in {', '.join(map(str, folders))}")
    return 0


def runs_below(folders: Sequence[Path]) -> Iterator[Path]:
    """Folders of runs in and below some, each once; a run's own folders and links are not entered."""
    seen = set()
    for top in folders:
        for place, below, files in os.walk(top):
            below.sort()
            if "config.yaml" not in files:
                continue
            below.clear()
            if (real := Path(place).resolve()) not in seen:
                seen.add(real)
                yield Path(place)


def describe(folder: Path) -> dict[str, Any]:
    """A run as plain values; ``problem`` says what is wrong with a folder that cannot be read.

    Accuracies are in percent, ratios over dense training and the dense network, ``modified`` is when its
    newest line was written (seconds since 1970).
    """
    from clicktrain.report.run_data import read_runs
    from clicktrain.runs.lock import holder

    row: dict[str, Any] = {"run": str(folder), "state": "damaged", "problem": None}
    try:
        (run,) = read_runs([folder])
    except UserError as error:
        return {**row, "problem": str(error)}
    state = "finished" if run.finished else "stopped" if holder(folder) is None else "running"
    config: Mapping[str, Any] = run.config
    written = folder / "metrics.jsonl"
    return {
        **row,
        "state": state,
        "method": run.method,
        "model": config.get("model"),
        "data": config.get("data"),
        "seed": config.get("seed"),
        "epochs": run.epochs_asked,
        "epochs_done": run.epochs_done,
        "accuracy": run.accuracy,
        "best_accuracy": run.best_accuracy,
        "compression_asked": run.compression_asked,
        "compression": run.compression,
        "train_flops_ratio": run.train_flops_ratio,
        "inference_flops_ratio": run.inference_flops_ratio,
        "seconds": run.seconds,
        "warnings": list((run.summary or {}).get("warnings") or ()),
        "modified": written.stat().st_mtime if written.is_file() else None,
    }


def _sinking(key: str) -> Callable[[Mapping[str, Any]], tuple[float, str]]:
    """Largest first, then by name; without the figure last."""

    def order(row: Mapping[str, Any]) -> tuple[float, str]:
        value = row.get(key)
        return (float("inf") if value is None else -value, row["run"])

    return order


_ORDERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "name": lambda row: row["run"],
    "accuracy": _sinking("accuracy"),
    "compression": _sinking("compression"),
    "date": _sinking("modified"),
    "time": lambda row: (float("inf") if row.get("seconds") is None else row["seconds"], row["run"]),
}

_HEAD = ("run", "method", "model", "state", "epochs", "accuracy", "compression", "training", "inference",
         "time")  # fmt: skip


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["problem"] is not None:
        return (row["run"], "-", "-", row["state"], *"-" * (len(_HEAD) - 4))
    done, whole = row["epochs_done"], row["epochs"]

    def cell(key: str, text: Callable[[Any], str]) -> str:
        return "-" if row[key] is None else text(row[key])

    missed = " (missed)" if row["warnings"] else ""
    return (
        row["run"],
        row["method"],
        str(row["model"]),
        row["state"] + missed,
        str(whole) if row["state"] == "finished" else f"{done}/{whole}",
        cell("accuracy", lambda value: f"{value:.2f}%"),
        cell("compression", lambda value: f"{value:.2f}x"),
        cell("train_flops_ratio", lambda value: f"{100 * value:.0f}%"),
        cell("inference_flops_ratio", lambda value: f"{100 * value:.0f}%"),
        cell("seconds", short_duration),
    )
