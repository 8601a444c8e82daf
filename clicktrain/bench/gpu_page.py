"""A page of what was measured on a GPU, made of the JSON that `scripts/gpu.py` leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HEAD = """# Measured on a GPU

Written by `python scripts/gpu.py --out {folder}`. Ratios are of the fastest dense alternative over ours; what
the model of [gpu.md](gpu.md) predicted stands beside what was measured.
"""


def page(folder: Path) -> str:
    """A Markdown page of all pieces in a folder, by name.

    Dry pieces have checks, but no figures, and say so.
    """
    parts = [_HEAD.format(folder=folder.name)]
    machines = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for own in document.get("rows", {}).values() for row in own]
        machine = document.get("machine", {})
        machines[json.dumps(machine, sort_keys=True)] = machine
        parts.append(f"## {path.stem}\n")
        if document.get("dry"):
            parts.append(f"Run dry: {len(rows)} rows were checked on a CPU, none was timed.\n")
        elif rows:
            parts.append(_table(rows) + "\n")
        for name, text in document.get("failed", {}).items():
            last = text.strip().splitlines()[-1] if text.strip() else ""
            parts.append(f"- failed: {name}: {last}")
    parts[1:1] = [
        f"- {', '.join(f'{key} {value}' for key, value in one.items())}" for one in machines.values()
    ]
    return "\n".join(parts).rstrip() + "\n"


def _table(rows: list[Mapping[str, Any]]) -> str:
    if "phase" in rows[0]:
        head = ["layer", "direction", "dense ms", "sparse ms", "tile", "ratio", "predicted"]
        lines = [_layer(row) for row in rows]
    elif "val_accuracy" in rows[0]:
        head = ["method", "accuracy", "seconds", "training FLOPs", "density"]
        lines = [
            [
                str(row["case"].get("method")), _number(row["val_accuracy"], 2), _number(row["seconds"], 1),
                _number(row["train_flops_ratio"], 3), _number(row["density"], 4),
            ]
            for row in rows
        ]  # fmt: skip
    else:
        names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
        head = ["case", *(f"{name} ms" for name in names), "ratio"]
        lines = [
            [_case(row), *(_number(row["ms"].get(name), 3) for name in names), _number(row["ratio"], 2)]
            for row in rows
        ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def _layer(row: Mapping[str, Any]) -> list[str]:
    dense, sparse = row["dense"], row["sparse"]
    best = min(sparse, key=lambda tile: sparse[tile], default=None)
    return [
        _case(row),
        row["phase"],
        _number(min(dense.values(), default=None), 4),
        _number(None if best is None else sparse[best], 4),
        "none" if best is None else f"`{best}`",
        _number(row["ratio"], 2),
        _number(row["predicted_ratio"], 2),
    ]


def _case(row: Mapping[str, Any]) -> str:
    case = dict(row["case"])
    shape = case.pop("shape", None)
    words = [] if shape is None else ["x".join(str(shape[key]) for key in ("batch", "channels", "height"))]
    return ", ".join([*words, *(f"{key} {value}" for key, value in case.items())])


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
