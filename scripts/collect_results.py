"""Copy what is worth keeping of finished runs, and print their table in Markdown.

python scripts/collect_results.py runs/A runs/B -o docs/results/NAME
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

KEPT = ("config.yaml", "summary.json", "metrics.jsonl", "events.jsonl")
SOME_HAVE = ("channels.jsonl", "surgery.json")
HEAD = ("run", "accuracy", "best", "compression", "training FLOPs", "inference FLOPs", "hard prune", "seed")


def row(name: str, s: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table; accuracies in percent, FLOPs over the dense run's, the hard prune in epochs."""
    prune = s.get("hard_prune_epoch")
    return (
        name,
        f"{s['val_accuracy']:.2f}",
        f"{s['best_val_accuracy']:.2f}",
        f"{s['compression_ratio']:.2f}x",
        f"{100 * s['train_flops_ratio']:.0f}%",
        f"{100 * s['inference_flops_ratio']:.0f}%",
        "" if prune is None else f"{prune:.2f} of {s['epochs']}",
        str(s["seed"]),
    )


def main() -> None:
    """Parse, copy, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, help="folder for the copies")
    args = parser.parse_args()
    print("| " + " | ".join(HEAD) + " |")
    print("|" + "---|" * len(HEAD))
    for run in args.runs:
        summary = json.loads((run / "summary.json").read_text())
        print("| " + " | ".join(row(run.name, summary)) + " |")
        if args.output:
            target = args.output / run.name
            target.mkdir(parents=True, exist_ok=True)
            for name in (*KEPT, *(name for name in SOME_HAVE if (run / name).exists())):
                shutil.copyfile(run / name, target / name)


if __name__ == "__main__":
    main()
