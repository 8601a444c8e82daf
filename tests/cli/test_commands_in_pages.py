"""Every command line that a page shows names a command and flags that there are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from clicktrain.commands.catalog import every_command

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md"))]
)
FLAGS = {
    name: {option for command in commands for option in command.options} | {"help", "help_all"}
    for name, commands in every_command().items()
}
START = re.compile(r"(?:^|[\s;&|])(?<!from )(?:python -m )?clicktrain ([a-z]+)\b(.*)")


def lines_of_code(text: str) -> Iterator[str]:
    """Lines of fenced blocks, continued ones as one, and spans of code."""
    fence = re.compile(r"^```.*?$\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for block in fence.findall(text):
        yield from re.sub(r"\\\n\s*", " ", block).splitlines()
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", fence.sub("", text)):
        yield " ".join(span.replace(r"\|", "|").split())


def mistakes(line: str) -> list[str]:
    """What is wrong with the command on a line, if there is one."""
    found = START.search(line)
    if found is None:
        return []
    name, rest = found.groups()
    if name not in FLAGS:
        return [f"no command {name}"]
    try:
        words = shlex.split(rest, comments=True)
    except ValueError:
        words = rest.split()
    given = [word.partition("=")[0][2:].replace("-", "_") for word in words if re.match(r"--[a-z]", word)]
    return [flag for flag in given if not {flag, flag.removeprefix("no_")} & FLAGS[name]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_commands_and_their_flags_exist(page: Path) -> None:
    lines = list(lines_of_code(page.read_text(encoding="utf-8")))
    assert {line: wrong for line in lines if (wrong := mistakes(line))} == {}


def test_mistakes_are_found() -> None:
    assert mistakes("clicktrain trian --data digits") == ["no command trian"]
    assert mistakes("OMP_NUM_THREADS=1 clicktrain train --datta digits --no-report  # --more") == ["datta"]
    assert mistakes("clicktrain export runs/NAME --format c") == []
    assert mistakes("clicktrain.load('runs/NAME')") == []
