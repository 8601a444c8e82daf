"""Write the JSON of ``clicktrain bench conv`` and ``clicktrain bench step`` as Markdown tables.

python scripts/bench_tables.py FILE.json ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PHASES = ("forward", "dgrad", "wgrad")
_OLD_NAMES = (("grad_input", "dgrad"), ("grad_weight", "wgrad"))


def _kind(row: dict[str, Any]) -> str:
    """As the geometric means are named; files from before activations were kept in bf16 say no precision."""
    precision = " bf16" if row.get("precision") == "bf16" else ""
    return f"{row['compression']:g}x G={row['group']}{precision}"


def conv(rows: list[dict[str, Any]], geomean: dict[str, float]) -> list[str]:
    """One line a shape: ratios over the fastest dense fp32 call, forward / dgrad / wgrad."""
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    shapes = list(dict.fromkeys(tuple(row["shape"]) for row in rows))
    found = {(tuple(r["shape"]), _kind(r), r["phase"]): r for r in rows}
    lines = ["| C=F @ HxW, N | " + " | ".join(kind.replace(" ", ", ") for kind in kinds) + " |"]
    lines.append("|---" * (len(kinds) + 1) + "|")
    for shape in shapes:
        cells = [
            " / ".join(f"{found[shape, kind, phase]['ratio']:.2f}" for phase in PHASES) for kind in kinds
        ]
        lines.append(f"| {shape[0]} @ {shape[2]}x{shape[3]}, {shape[4]} | " + " | ".join(cells) + " |")
    means = [" / ".join(f"**{geomean[f'{kind} {phase}']:.2f}**" for phase in PHASES) for kind in kinds]
    lines.append("| geometric mean | " + " | ".join(means) + " |")
    return lines


def step(rows: list[dict[str, Any]]) -> list[str]:
    """One line a compression."""
    lines = ["| network | compression | dense fp32 | dense bf16 | sparse | over fp32 | over bf16 |"]
    lines.append("|---" * 7 + "|")
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['compression']:g}x, G={row['group']} "
            f"| {row['dense_fp32_ms']:.0f} ms ({row['dense_fp32_name']}) "
            f"| {row['dense_bf16_ms']:.0f} ms ({row['dense_bf16_name']}) | {row['sparse_ms']:.0f} ms "
            f"| **{row['ratio_fp32']:.2f}x** | **{row['ratio_bf16']:.2f}x** |"
        )
    return lines


def main() -> None:
    """Print the tables of the files named on the command line."""
    for name in sys.argv[1:]:
        text = Path(name).read_text()
        for old, new in _OLD_NAMES:
            text = text.replace(old, new)
        data = json.loads(text)
        rows = data["rows"]
        table = conv(rows, data["geomean"]) if "phase" in rows[0] else step(rows)
        print("\n".join([*table, ""]))


if __name__ == "__main__":
    main()
