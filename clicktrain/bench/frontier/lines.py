"""What is kept of a run, in one line of JSON: everything that a frontier needs but the times of a machine."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clicktrain.bench.frontier.recipe import Cell
from clicktrain.bench.frontier.structure import describe_masks
from clicktrain.errors import UserError, shown
from clicktrain.formats.atomic import append_jsonl
from clicktrain.runs.folder import RunFolder
from clicktrain.runs.format import read_records
from clicktrain.train import load_run
from clicktrain.train.device import resolve_device
from clicktrain.train.prepare import make_train_loader, open_run_data

Line = dict[str, Any]
"""``name, seed, kind, method, setting, width, epochs, settings, status``; of a finished run also ``figures``,
``phases``, ``network`` and ``structure``, of a failed one ``reason``."""

FIGURES = (
    "val_accuracy", "best_val_accuracy", "test_accuracy", "compression_ratio", "train_flops",
    "initial_train_flops", "inference_flops", "parameters", "nonzero_parameters", "train_seconds",
    "hard_prune_epoch", "cpu",
)  # fmt: skip
"""Keys of ``summary.json`` that are kept."""
_FROZEN = ("accelerated", "fixed", "sparse")
"""Stages in which a network does not change any more, where a run has recorded no hard prune."""


def head(cell: Cell, seed: int) -> Line:
    """The part of a line that the recipe says."""
    return {
        "name": cell.name,
        "seed": seed,
        "kind": cell.kind,
        "method": cell.method,
        "setting": cell.setting,
        "width": cell.width,
        "epochs": cell.epochs,
        **({} if cell.after is None else {"after": cell.after}),
        "settings": dict(cell.settings),
    }


def finished_line(cell: Cell, seed: int, folder: RunFolder) -> Line:
    """The line of a finished run, read from its folder; opens its data to count images."""
    loaded = load_run(folder.path)
    summary, config = loaded.summary, loaded.config
    data = open_run_data(config)
    metrics = folder.read_metrics()
    sizes = [path.stat().st_size for path in (folder.packed, folder.model) if path.is_file()]
    batches = len(make_train_loader(config, data, resolve_device(config.device)))
    evaluations = sum(line.get("val_accuracy") is not None for line in metrics)
    figures = {key: summary[key] for key in FIGURES if summary.get(key) is not None}
    return {
        **head(cell, seed),
        "status": "finished",
        "commit": _commit(),
        "versions": summary["versions"],
        "figures": {
            **figures,
            "bytes": min(sizes),
            "batches": batches * config.epochs,
            "evaluated_batches": evaluations * -(-len(data.val) // config.batch_size),
            "test_images": None if getattr(data, "test", None) is None else len(data.test or ()),
        },
        "network": {
            "classes": len(data.classes),
            "image_shape": list(data.image_shape),
            "channels_removed": folder.surgery.is_file(),
        },
        "phases": phases_of(metrics, folder.read_events(), batches),
        "structure": describe_masks(loaded.masks),
        "rule": _rule(folder.read_events()),
        "plans": sum(event.get("event") == "operators" for event in folder.read_events()),
    }


def failed_line(cell: Cell, seed: int, reason: str) -> Line:
    """The line of a run that pruning has destroyed, or that diverged."""
    return {**head(cell, seed), "status": "failed", "commit": _commit(), "reason": reason}


def phases_of(
    metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], batches: int
) -> list[dict[str, Any]]:
    """How many batches a run has spent in which stage, at which density of the convolutions.

    Args:
        metrics, events: lines of the run's logs.
        batches: of an epoch.

    Returns:
        ``stage, frozen, fast, density, batches, updates``: consecutive epochs in one stage at one density (to
        1%) are one phase; ``frozen``: the network does not change any more; ``fast``: operators were chosen
        for sparse layers before or in it; ``updates``: how often masks changed.
    """
    frozen = _frozen_stages(events)
    phases: list[dict[str, Any]] = []
    before = 1.0
    for line in metrics:
        cut = any(stage in frozen for stage in line["stages"])
        for stage, share in line["stages"].items():
            # The line has the density at the end of its epoch.
            density = before if cut and stage not in frozen else line["density"]
            one = {"stage": stage, "frozen": stage in frozen, "density": round(density, 4),
                   "batches": share * batches, "updates": 0}  # fmt: skip
            last = phases[-1] if phases else None
            same = ("stage", "frozen")
            if last and all(last[k] == one[k] for k in same) and abs(last["density"] - one["density"]) < 0.01:
                last["batches"] += one["batches"]
            else:
                phases.append(one)
        before = line["density"]
    for phase in phases:
        phase["batches"] = round(phase["batches"])
    _count_updates(phases, events)
    return phases


def _frozen_stages(events: Sequence[Mapping[str, Any]]) -> set[str]:
    """The stages entered once masks are frozen."""
    names = [event.get("event") for event in events]
    if "hard_prune" not in names:
        return set(_FROZEN)
    # A method may record the stage just before or just after the masks that it begins with.
    at = names.index("hard_prune")
    moment = events[at].get("step")
    return {
        str(event["stage"]) for number, event in enumerate(events)
        if event.get("event") == "stage" and (number > at or event.get("step") == moment)
    }  # fmt: skip


def _count_updates(phases: list[dict[str, Any]], events: Sequence[Mapping[str, Any]]) -> None:
    end, bounds = 0, []
    chosen = next((event.get("step") for event in events if event.get("event") == "operators"), None)
    for phase in phases:
        end += phase["batches"]
        bounds.append(end)
        phase["fast"] = isinstance(chosen, int) and chosen < end
    for event in events:
        if event.get("event") in ("regrown", "dropped", "threshold") and isinstance(event.get("step"), int):
            at = next((i for i, bound in enumerate(bounds) if event["step"] <= bound), None)
            if at is not None:
                phases[at]["updates"] += 1


def _rule(events: Iterable[Mapping[str, Any]]) -> str | None:
    """How the operators of the frozen network were chosen."""
    return next((event.get("rule") for event in events if event.get("event") == "operators"), None)


def _commit() -> str | None:
    """The commit of this code, where it is in a repository."""
    where = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=where, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def read_lines(path: Path) -> dict[tuple[str, int], Line]:
    """(name of the cell, seed) -> line; the last one counts. Empty if there is no file.

    Raises:
        UserError: a line is damaged.
    """
    lines = {}
    for line in read_records(path):
        try:
            lines[str(line["name"]), int(line["seed"])] = line
            if line["status"] not in ("finished", "failed"):
                raise KeyError("status")
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path} is damaged: it has the line {shown(json.dumps(line))}") from None
    return lines


def add_line(path: Path, line: Line) -> None:
    """Add a line to the file, which is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_jsonl(path, line)


def is_of(line: Line, cell: Cell) -> bool:
    """Whether a line is of a run with the settings that the cell has now."""
    plain = json.loads(json.dumps(dict(cell.settings)))
    return bool(line.get("settings") == plain and line.get("after") == cell.after)
