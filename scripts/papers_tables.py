"""Write the tables of docs/papers.md and docs/results/reproduced.md, or say that they are stale.

python scripts/papers_tables.py [--check]
python scripts/papers_tables.py --collect FILE ... --commit ID    # of `clicktrain reproduce ITEM --json FILE`

A table follows ``<!-- items of PAPER: code -->`` or ``<!-- items of PAPER: runs -->`` up to ``<!-- end -->``:
rows in clicktrain/papers. ``<!-- run PAPER/ITEM -->``: accuracies and figures of the file reproduced.json,
which has what ``clicktrain reproduce PAPER/ITEM --json`` printed, and accuracies of the runs' summaries.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clicktrain.files import read_json
from clicktrain.papers import Row, read_rows, read_settings
from clicktrain.papers.rows import Setting

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = (DOCS / "papers.md", DOCS / "results" / "reproduced.md")
REPRODUCED = DOCS / "results" / "reproduced.json"
RATIOS = ("train_flops_ratio", "inference_flops_ratio", "total_train_flops_ratio", "compression_ratio")
FIGURE = ("what", "paper", "ours", "deviation", "seeds", "unit")
_RUN = re.compile(r"(<!-- run ([\w/-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_TABLE = re.compile(r"(<!-- items of ([\w-]+): (code|runs) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables(text: str) -> str:
    """A page with every table rebuilt."""

    def rebuilt(match: re.Match[str]) -> str:
        rows = [row for name, row in read_rows().items() if name.startswith(f"{match[2]}/")]
        return match[1] + (code_table(rows) if match[3] == "code" else runs_table(rows)) + match[4]

    reproduced = read_json(REPRODUCED)
    text = _RUN.sub(lambda match: match[1] + run_tables(reproduced[match[2]]) + match[3], text)
    return _TABLE.sub(rebuilt, text)


def collect(path: Path, commit: str) -> tuple[str, dict[str, Any]]:
    """An item's name and what reproduced.json keeps of it: no folder of a machine, accuracies by seed."""
    given = read_json(path)
    folders = [
        Path(word[word.index("--out") + 1]) for word in map(shlex.split, given["commands"]) if "--out" in word
    ]
    runs: dict[str, dict[str, Any]] = {}
    for folder in folders:
        name, _, seed = folder.name.rpartition("-s")
        summary, run = read_json(folder / "summary.json"), runs.setdefault(name, {})
        run.setdefault("accuracy", {})[seed] = round(summary["val_accuracy"], 2)
        if summary.get("test_accuracy") is not None:
            run.setdefault("test_accuracy", {})[seed] = round(summary["test_accuracy"], 2)
        for key in RATIOS:
            if summary.get(key) is not None:
                run.setdefault(key, []).append(summary[key])
    for run in runs.values():
        run |= {key: round(statistics.fmean(run[key]), 4) for key in RATIOS if key in run}
    seeds = sorted({int(folder.name.rpartition("-s")[2]) for folder in folders})
    setting, _, flags = given["setting"].partition(": ")[2].partition("; but ")
    more = f" --flags='{flags}'" if flags else ""
    return given["item"], {
        "setting": ", ".join(part for part in (setting, flags.removeprefix("--precision ")) if part),
        "seeds": seeds,
        "commit": commit,
        "command": f"clicktrain reproduce {given['item']} --seeds {' '.join(map(str, seeds))}{more}",
        "runs": runs,
        "figures": [{key: figure[key] for key in FIGURE} for figure in given["figures"]],
    }


def run_tables(item: Mapping[str, Any]) -> str:
    """Command, accuracies of the runs and figures beside the paper's."""
    seeds = ", ".join(map(str, item["seeds"]))
    head = f"{item['setting']}; seeds {seeds}:\n\n```\n{item['command']}\n```\n\n"
    columns = {
        "training FLOPs": "train_flops_ratio",
        "with the first training": "total_train_flops_ratio",
        "inference FLOPs": "inference_flops_ratio",
    }
    runs = item["runs"].values()
    tested = any("test_accuracy" in run for run in runs)
    if all(run.get("train_flops_ratio") == run.get("total_train_flops_ratio") for run in runs):
        del columns["with the first training"]
    rows = []
    for name, run in item["runs"].items():
        texts = [over_seeds(run["accuracy"])]
        texts += [over_seeds(run["test_accuracy"])] if tested else []
        texts += [f"{100 * run[key]:.0f}%" if key in run else "" for key in columns.values()]
        rows.append((f"`{name}`", *texts))
    accuracy = ("held-out images", "test images") if tested else ("accuracy",)
    compared = [(one["what"], str(one["paper"]), number(one), one["unit"]) for one in item["figures"]]
    return (
        head
        + markdown(("run", *accuracy, *columns), rows)
        + "\n"
        + markdown(("figure", "paper", "here", "unit"), compared)
    )


def over_seeds(values: Mapping[str, float]) -> str:
    """Mean and standard deviation of the sample."""
    numbers = list(values.values())
    mean = f"{statistics.fmean(numbers):.2f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.2f}"


def number(figure: Mapping[str, Any]) -> str:
    """Ours, with its deviation over seeds."""
    if figure["ours"] is None:
        return "not run"
    deviation = "" if figure["deviation"] is None else f" ± {figure['deviation']:.2f}"
    return f"{figure['ours']:.2f}{deviation}"


def code_table(rows: Iterable[Row]) -> str:
    """What holds each item: code and tests."""
    lines = [(short(row), row.place, row.what, pointers(row.code), pointers(row.test)) for row in rows]
    return markdown(("item", "where", "what", "code", "test"), lines)


def runs_table(rows: Iterable[Row]) -> str:
    """What reproduces each item, what came out, and where we leave the paper."""
    lines = [(short(row), commands(row), outcome(row), row.leaves) for row in rows]
    return markdown(("item", "commands", "result", "where we leave the paper, or choose"), lines)


def short(row: Row) -> str:
    """Name of an item within its paper."""
    return f"`{row.name.partition('/')[2]}`"


def pointers(names: Sequence[str]) -> str:
    """Files and names, each in backquotes."""
    return ", ".join(f"`{name}`" for name in names)


def commands(row: Row) -> str:
    """The commands of a row in its small setting and, where that differs, which recipe is the paper's."""
    if not row.runs:
        return ""
    settings = read_settings()
    small, paper = (settings[name] if name else None for name in (row.small, row.paper))
    parts = [f"{run}: `{command(text, small or paper)}`" for run, text in row.runs.items()]
    if small is not None and paper is not None:
        parts.append(f"the paper's setting: `{with_setting(paper)}`")
    return "<br>".join(parts)


def command(text: str, setting: Setting | None) -> str:
    """A command line as it is typed, without its folder."""
    first, _, rest = text.partition(" ")
    if first != "train" or setting is None:
        return f"clicktrain {text}"
    return f"clicktrain train {with_setting(setting)} {rest}".rstrip()


def with_setting(setting: Setting) -> str:
    """A recipe and the flags over it."""
    return shlex.join(["--config", setting.recipe, *shlex.split(setting.flags)])


def outcome(row: Row) -> str:
    """What came out, or why nothing did."""
    parts = [row.result] if row.result else []
    if row.not_run:
        parts.append(f"not run: {row.not_run}")
    if not parts:
        parts.append("not run yet" if row.runs else "held by its tests")
    return "; ".join(part.rstrip(".") for part in parts)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def stale() -> str:
    """A diff of the pages where their tables are not what the rows say; empty if they are."""
    diffs = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = (text.splitlines(keepends=True), tables(text).splitlines(keepends=True))
        diffs += list(difflib.unified_diff(*lines, str(page), "rows"))
    return "".join(diffs)


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--collect", nargs="+", type=Path, default=[], metavar="FILE")
    parser.add_argument("--commit", default="", help="of the code that ran")
    given = parser.parse_args()
    if given.collect:
        items = read_json(REPRODUCED)
        items.update(collect(path, given.commit) for path in given.collect)
        REPRODUCED.write_text(json.dumps(items, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if not given.check:
        for page in PAGES:
            page.write_text(tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    elif diff := stale():
        sys.exit(f"{diff}\nrun scripts/papers_tables.py to rewrite these tables")


if __name__ == "__main__":
    main()
