"""What accuracy each structure costs that GPU kernels profit from, on any device: the masks are the same.

python scripts/gpu_structures.py [--out FOLDER] [--seeds 0 1 2] [--filters 16 64] [--set KEY=VALUE ...]

Trains recipes/shared-structure.yaml dense, with nothing shared, and with each structure and number of filters
to a group; one line a run in FOLDER/structures.jsonl, and a table of means and spreads at the end. Runs that
are there are not done again, and a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from clicktrain.errors import UserError
from clicktrain.formats.atomic import append_jsonl
from clicktrain.methods.patterns.settings import PatternChoices
from clicktrain.runs.folder import RunFolder
from clicktrain.train import from_dict
from clicktrain.train.fit import fit

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "shared-structure.yaml"
_OF_PATTERNS = ("compression", "group", "share")


def structures(filters: Sequence[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and settings: the dense network, nothing shared, and each structure."""
    yield "dense", {"method": "dense"}
    yield "nothing shared", {"group": 1, "share": "kernels"}
    for share in get_args(get_type_hints(PatternChoices)["share"]):
        for group in filters:
            yield f"{share}, {group} filters", {"group": group, "share": share}


def settings_of(changes: dict[str, Any], seed: int, given: Sequence[str]) -> dict[str, Any]:
    """The recipe with a structure's settings, and those of the command line."""
    settings: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    for text in given:
        key, _, value = text.partition("=")
        settings[key] = yaml.safe_load(value)
    settings |= {**changes, "seed": seed}
    if settings["method"] == "dense":
        settings = {key: value for key, value in settings.items() if key not in _OF_PATTERNS}
    return settings


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean accuracy of each structure, with the least and the largest of its seeds, and what it loses."""
    by_name: dict[str, list[float]] = {}
    for row in rows:
        by_name.setdefault(row["structure"], []).append(row["val_accuracy"])
    free = statistics.mean(by_name["nothing shared"]) if "nothing shared" in by_name else None
    lines = ["| structure | accuracy | of seeds | against nothing shared |", "|---|---|---|---|"]
    for name, values in by_name.items():
        mean = statistics.mean(values)
        loss = "" if free is None else f"{mean - free:+.2f}"
        lines.append(
            f"| {name} | {mean:.2f} | {min(values):.2f} to {max(values):.2f} ({len(values)}) | {loss} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("runs/structures"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--filters", type=int, nargs="+", default=[16, 64])
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of the recipe"
    )
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "structures.jsonl"
    rows = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )
    done = {(row["structure"], row["seed"]) for row in rows}
    try:
        for seed in options.seeds:
            for name, changes in structures(options.filters):
                if (name, seed) in done:
                    continue
                settings = settings_of(changes, seed, options.set)
                folder = options.out / f"{name.replace(', ', '-').replace(' ', '-')}-s{seed}"
                summary = fit(*from_dict(settings), RunFolder(folder), resume="if begun")
                keys = ("val_accuracy", "density", "seconds")
                row = {"structure": name, "seed": seed, **{key: summary.get(key) for key in keys}}
                append_jsonl(path, {**row, "settings": settings})
                rows.append(row)
                print(f"{name}, seed {seed}: {row['val_accuracy']:.2f}", flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
