"""Keep figures of runs and measurements in one JSON Lines file per study; write the pages' tables.

python scripts/results.py collect runs/A runs/B -o docs/results/STUDY.jsonl    # add or replace runs
python scripts/results.py collect conv.json -o docs/results/bench-conv.jsonl   # --json of `clicktrain bench`
python scripts/results.py config docs/results/STUDY.jsonl RUN > config.yaml    # the settings of one run
python scripts/results.py tables docs/results/*.md [--check]                   # rewrite, or compare, tables

A study of runs has a first line ``{"study", "config"}`` with the settings that all share, then one line
per run: ``run, seed, commit, command, config`` (what differs), ``figures``. Of measurements, it has a line
``measurement, command, commit, machine, settings`` and one line per row, ``in`` naming its measurement.

A page's table follows a comment ``<!-- results: FILE.jsonl ...; dense: RUN; columns: a, b`` with one line per
row, ``RUN | own text | ...``, up to ``-->``. Columns that are not figures take the row's own texts in order.
``NAME-s*`` is all runs of a name, whatever their seed: accuracy is then mean, standard deviation of the
sample and number of seeds, other figures are means.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]

FIGURES = (
    "val_accuracy", "best_val_accuracy", "test_accuracy", "compression_ratio", "train_flops_ratio",
    "train_flops_ratio_nominal", "total_train_flops_ratio", "inference_flops_ratio", "train_seconds",
    "total_train_seconds", "epochs", "hard_prune_epoch", "parameters", "nonzero_parameters", "cpu", "gpu",
)  # fmt: skip
"""Keys of ``summary.json`` that a study keeps."""
_DECISIONS = ("trigger", "hard_prune", "latency", "outcome")
_DIRECTIVE = re.compile(r"<!-- results: ([^;]+); dense: (\S+); columns: ([^\n]+)\n(.*?)-->\n", re.DOTALL)


def read(path: Path) -> list[Row]:
    """The lines of a study; none if there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object per line, without spaces, keys in their order."""
    path.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))


def runs_of(study: list[Row]) -> dict[str, Row]:
    """Run name -> its line, with its full configuration."""
    shared = study[0]["config"] if study else {}
    return {row["run"]: {**row, "config": {**shared, **row["config"]}} for row in study[1:]}


def run_row(folder: Path, commit: str | None) -> Row:
    """What a study keeps of a finished run."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    summary = json.loads((folder / "summary.json").read_text())
    figures = {key: summary[key] for key in FIGURES if summary.get(key) is not None}
    figures["torch"] = summary["versions"]["torch"]
    metrics = read(folder / "metrics.jsonl")
    for key in ("seconds", "step_ms_median", "train_loss", "train_accuracy"):
        if values := [line[key] for line in metrics if line.get(key) is not None]:
            figures["epoch_" + key] = round(statistics.median(values), 3)
            figures["last_epoch_" + key] = round(values[-1], 3)
    decisions = [
        {key: value for key, value in event.items() if isinstance(value, (str, int, float, bool))}
        for event in read(folder / "events.jsonl")
        if any(event["event"].startswith(kind) for kind in _DECISIONS)
    ]
    command = f"clicktrain train --config {folder.name}.yaml"
    row = {"run": folder.name, "seed": summary["seed"], "commit": commit, "command": command}
    return {**row, "config": config, "figures": figures, "decisions": decisions}


def collect_runs(folders: Iterable[Path], path: Path, commit: Callable[[Path], str | None]) -> None:
    """Add runs to a study, or replace them."""
    runs = runs_of(read(path))
    runs.update((folder.name, run_row(folder, commit(folder))) for folder in folders)
    configs = [run["config"] for run in runs.values()]
    shared = {
        key: value for key, value in configs[0].items() if all(key in c and c[key] == value for c in configs)
    }
    rows = [
        {**run, "config": {key: value for key, value in run["config"].items() if key not in shared}}
        for run in runs.values()
    ]
    write(path, [{"study": path.stem, "config": shared}, *rows])


def collect_measurements(files: Iterable[Path], path: Path, commit: Callable[[Path], str | None]) -> None:
    """Add the JSON of ``clicktrain bench`` to a study, or replace it."""
    rows = read(path)
    for file in files:
        data, name = json.loads(file.read_text()), file.stem
        rows = [row for row in rows if name not in (row.get("measurement"), row.get("in"))]
        head = {
            "measurement": name,
            "command": bench_command(path.stem, data["settings"]),
            "commit": commit(file),
        }
        rows.append(
            {**head, **{key: value for key, value in data.items() if key not in ("rows", "by_layer")}}
        )
        kept = (*data["rows"], *(layer for run in data.get("by_layer") or () for layer in layers_of(run)))
        rows += [{"in": name, **rounded(row)} for row in kept]
    write(path, rows)


def layers_of(run: Row) -> Iterator[Row]:
    """The layers of a run, one row each."""
    for layer in run.get("layers", ()):
        yield {"run": run.get("run"), **layer}


def rounded(row: Row) -> Row:
    """Four significant digits; without what only the tuner of a kernel reads."""
    return {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in row.items()
        if key not in ("tiling", "fraction_of_peak", "multiply_adds_ms", "memory_ms") and value is not None
    }


def bench_command(study: str, settings: Mapping[str, Any]) -> str:
    """The command line that these settings stand for."""
    words = ["clicktrain", "bench", study.removeprefix("bench-")]
    for key, value in settings.items():
        if value not in (None, []):
            values = (
                value
                if isinstance(value, list)
                else [str(value).lower() if isinstance(value, bool) else value]
            )
            words += [
                "--" + key.replace("_", "-"),
                *(f"{v:g}" if isinstance(v, float) else str(v) for v in values),
            ]
    return " ".join(words)


# ---- tables --------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share of 1 as whole percent."""
    return f"{100 * share:.0f}%"


def runs_called(runs: Mapping[str, Row], name: str) -> list[Row]:
    """The run of a name, or with ``-s*`` at its end all seeds of it."""
    if not name.endswith("-s*"):
        return [runs[name]]
    found = [run for key, run in runs.items() if re.fullmatch(re.escape(name[:-1]) + r"\d+", key)]
    if not found:
        raise KeyError(name)
    return found


def mean(runs: Iterable[Row], *keys: str) -> float:
    """Mean over runs of the first of these figures that each has."""
    return statistics.fmean(
        next(run["figures"][key] for key in keys if key in run["figures"]) for run in runs
    )


def accuracy(runs: list[Row], key: str = "val_accuracy") -> str:
    """An accuracy; of several seeds mean, standard deviation and number."""
    values = [run["figures"][key] for run in runs]
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)})"


def cell(column: str, runs: list[Row], dense: list[Row]) -> str | None:
    """One figure as a page shows it, of one run or of all seeds; None for a column that is no figure."""
    f = runs[0]["figures"]
    prune = f.get("hard_prune_epoch")
    known: dict[str, Callable[[], str]] = {
        "accuracy": lambda: accuracy(runs),
        "best": lambda: accuracy(runs, "best_val_accuracy"),
        "to dense": lambda: (
            "" if runs == dense else f"{mean(runs, 'val_accuracy') - mean(dense, 'val_accuracy'):+.2f}"
        ),
        "compression": lambda: f"{mean(runs, 'compression_ratio'):.2f}x",
        "parameters": lambda: f"{mean(runs, 'parameters'):,.0f}",
        "nonzero": lambda: f"{mean(runs, 'nonzero_parameters'):,.0f}",
        "training FLOPs": lambda: percent(mean(runs, "total_train_flops_ratio", "train_flops_ratio")),
        "nominal FLOPs": lambda: (
            percent(mean(runs, "train_flops_ratio_nominal"))
            if all("train_flops_ratio_nominal" in run["figures"] for run in runs)
            else "not counted"
        ),
        "inference FLOPs": lambda: percent(mean(runs, "inference_flops_ratio")),
        "hard prune": lambda: "" if prune is None else f"{prune:.2f} of {f['epochs']}",
        "seed": lambda: ", ".join(str(run["seed"]) for run in runs),
    }
    return known[column]() if column in known else None


def table(runs: Mapping[str, Row], dense: list[Row], columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; differences are to the dense baseline."""
    lines = ["| " + " | ".join(("run", *columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, *texts in rows:
        cells = [cell(column, runs_called(runs, name), dense) for column in columns]
        cells = [(texts.pop(0) if texts else "") if text is None else text for text in cells]
        lines.append("| " + " | ".join((name, *cells)) + " |")
    return "\n".join(lines) + "\n"


def with_tables(page: Path) -> str:
    """The page's text with every table rebuilt from its study."""
    parts, end, text = [], 0, page.read_text()
    for match in _DIRECTIVE.finditer(text):
        runs = {
            name: run for file in match[1].split() for name, run in runs_of(read(page.parent / file)).items()
        }
        rows = [[part.strip() for part in line.split("|")] for line in match[4].strip().splitlines()]
        columns = [column.strip() for column in match[3].split(",")]
        old = re.compile(r"(\|[^\n]*\n)*").match(text, match.end())
        assert old is not None
        parts += [text[end : match.end()], table(runs, runs_called(runs, match[2]), columns, rows)]
        end = old.end()
    return "".join([*parts, text[end:]])


def stale_pages(pages: Iterable[Path]) -> str:
    """A diff of the pages whose tables are not what their studies say; empty if there is none."""
    return "".join(
        line
        for page in pages
        for line in difflib.unified_diff(
            page.read_text().splitlines(keepends=True),
            with_tables(page).splitlines(keepends=True),
            str(page),
            "study",
        )
    )


def head_commit(place: Path) -> str | None:
    """The commit that is checked out here."""
    del place
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    collect = commands.add_parser("collect")
    collect.add_argument("sources", nargs="+", type=Path)
    collect.add_argument("-o", "--output", type=Path, required=True)
    config = commands.add_parser("config")
    config.add_argument("study", type=Path)
    config.add_argument("run")
    tables = commands.add_parser("tables")
    tables.add_argument("pages", nargs="+", type=Path)
    tables.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if args.command == "collect":
        collector = collect_runs if args.sources[0].is_dir() else collect_measurements
        collector(args.sources, args.output, head_commit)
    elif args.command == "config":
        yaml.safe_dump(runs_of(read(args.study))[args.run]["config"], sys.stdout, sort_keys=False)
    elif args.check:
        if stale := stale_pages(args.pages):
            sys.exit(f"{stale}\nrun scripts/results.py tables to rewrite these tables")
    else:
        for page in args.pages:
            page.write_text(with_tables(page))


if __name__ == "__main__":
    main()
