"""Write the tables of docs/papers.md from the rows in clicktrain/papers, or say that they are stale.

python scripts/papers_tables.py [--check]

A table follows ``<!-- items of PAPER: code -->`` or ``<!-- items of PAPER: runs -->`` up to ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from clicktrain.papers import Row, read_rows, read_settings
from clicktrain.papers.rows import Setting

PAGE = Path(__file__).resolve().parent.parent / "docs" / "papers.md"
_TABLE = re.compile(r"(<!-- items of ([\w-]+): (code|runs) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables(text: str) -> str:
    """A page with every table rebuilt."""

    def rebuilt(match: re.Match[str]) -> str:
        rows = [row for name, row in read_rows().items() if name.startswith(f"{match[2]}/")]
        return match[1] + (code_table(rows) if match[3] == "code" else runs_table(rows)) + match[4]

    return _TABLE.sub(rebuilt, text)


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
    """A diff of the page where its tables are not what the rows say; empty if they are."""
    text = PAGE.read_text(encoding="utf-8")
    return "".join(
        difflib.unified_diff(
            text.splitlines(keepends=True), tables(text).splitlines(keepends=True), str(PAGE), "rows"
        )
    )


def main() -> None:
    """Parse the command line and do it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    elif diff := stale():
        sys.exit(f"{diff}\nrun scripts/papers_tables.py to rewrite these tables")


if __name__ == "__main__":
    main()
