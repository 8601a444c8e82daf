"""Rows: what stands here for each item of the papers; read from the files beside this one."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from clicktrain.errors import UserError, shown
from clicktrain.files import read_yaml

FOLDER = Path(__file__).parent
KINDS = {
    "alg": "algorithm",
    "eq": "equation",
    "table": "table",
    "fig": "figure",
    "net": "network",
    "data": "data set",
    "text": "text",
}
"""First word of an item's name -> its kind. ``text``: stated in a section, without a number."""

_ROW_KEYS = ("code", "test", "small", "paper", "runs", "digits", "figures", "result", "not_run", "leaves")
_FIGURE_KEYS = ("what", "paper", "ours", "unit")
_SETTING_KEYS = ("says", "recipe", "flags")


@dataclass(frozen=True)
class Setting:
    """A network, data and length that commands are run in: a recipe, and flags over it."""

    name: str
    says: str
    recipe: str
    flags: str = ""


@dataclass(frozen=True)
class Figure:
    """A number of the paper, and the one of ours to put beside it.

    Attributes:
        what: in words.
        paper: as the paper has it; a number in ``unit``, or words where it is a range or only a statement.
        ours: an expression over results of runs, see `clicktrain.papers.figures`.
        unit: of both: ``%``, ``points``, ``x``, ``ms`` or none.
    """

    what: str
    paper: float | str
    ours: str
    unit: str = ""


@dataclass(frozen=True)
class Row:
    """An item of a paper, and what stands for it here.

    Attributes:
        name: ``PAPER/KIND-...``.
        place: section, equation, table or figure.
        what: in words.
        code: ``FILE::NAME`` below ``clicktrain/``.
        test: ``FILE::NAME`` below ``tests/``.
        small, paper: name of the setting in which it is run on a CPU, and of the paper's own.
        runs: name -> command, see `clicktrain.papers.plan`.
        digits: name of a run -> flags that make it quick.
        figures: what is compared.
        result: what came out, with its setting and a link (Markdown, relative to ``docs/``).
        not_run: beside a result, what of the item it leaves out; else why there is none.
        leaves: where we leave the paper.
    """

    name: str
    place: str
    what: str
    code: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    small: str | None = None
    paper: str | None = None
    runs: Mapping[str, str] = field(default_factory=dict)
    digits: Mapping[str, str] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    result: str = ""
    not_run: str = ""
    leaves: str = ""

    @property
    def kind(self) -> str:
        """What kind of item it is, in words."""
        return KINDS[self.name.partition("/")[2].partition("-")[0]]

    @property
    def runnable(self) -> bool:
        """Whether there are commands for a CPU."""
        return bool(self.runs) and (self.small is not None or not trains(self.runs))

    @property
    def state(self) -> str:
        """In a few words: run and in which setting, can be run, not run and why, or held by tests alone."""
        if self.result:
            says = "one core of a CPU" if self.small is None else read_settings()[self.small].says
            return f"{'partly run' if self.not_run else 'run'} in a smaller setting: {says}"
        if self.runnable:
            return "can be run"
        return f"not run: {self.not_run}" if self.not_run else "tested"


def trains(runs: Mapping[str, str]) -> bool:
    """Whether one of the commands trains a network."""
    return any(command.split()[0] == "train" for command in runs.values())


@lru_cache(maxsize=1)
def read_settings() -> Mapping[str, Setting]:
    """All settings by name."""
    values = read_yaml(FOLDER / "settings.yaml")
    found = {}
    for name, entry in values.items():
        _check_keys(entry, _SETTING_KEYS, name)
        found[name] = Setting(name, **entry)
    return found


def read_contents() -> dict[str, dict[str, tuple[str, str]]]:
    """Paper -> item -> (place, what): the papers' items, in their order."""
    values = read_yaml(FOLDER / "contents.yaml")
    return {
        paper: {name: (str(place), str(what)) for name, (place, what) in items.items()}
        for paper, items in values.items()
    }


@lru_cache(maxsize=1)
def read_rows() -> Mapping[str, Row]:
    """All rows by name, in the papers' order. An item without an entry has an empty row."""
    found = {}
    for paper, items in read_contents().items():
        entries: dict[str, Any] = read_yaml(FOLDER / "rows" / f"{paper}.yaml")
        if unknown := set(entries) - set(items):
            raise UserError(f"contents.yaml has no {paper}/{min(unknown)}: add the item, or correct its name")
        for item, (place, what) in items.items():
            found[f"{paper}/{item}"] = _row(f"{paper}/{item}", place, what, entries.get(item) or {})
    return found


def _row(name: str, place: str, what: str, entry: Mapping[str, Any]) -> Row:
    _check_keys(entry, _ROW_KEYS, name)
    figures = []
    for figure in entry.get("figures", ()):
        _check_keys(figure, _FIGURE_KEYS, f"a figure of {name}")
        figures.append(Figure(**figure))
    texts = {key: " ".join(str(entry.get(key, "")).split()) for key in ("result", "not_run", "leaves")}
    return Row(
        name, place, what,
        code=_many(entry.get("code")), test=_many(entry.get("test")),
        small=entry.get("small"), paper=entry.get("paper"),
        runs={key: " ".join(text.split()) for key, text in entry.get("runs", {}).items()},
        digits=entry.get("digits", {}), figures=tuple(figures), **texts,
    )  # fmt: skip


def _many(value: object) -> tuple[str, ...]:
    """Words of a text, or a list, as a tuple."""
    return tuple(value.split()) if isinstance(value, str) else tuple(value or ())  # type: ignore[arg-type]


def _check_keys(entry: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in entry:
        if key not in known:
            raise UserError(f"{where} has no key {shown(key)}: there are {', '.join(known)}")


def rows_called(name: str) -> list[Row]:
    """The rows of a name or a shell-style pattern (``'campfire/*'``); UserError if there are none."""
    rows = read_rows()
    found = [row for key, row in rows.items() if fnmatch.fnmatchcase(key, name)]
    if not found:
        near = difflib.get_close_matches(name, rows, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "'clicktrain reproduce' lists them"
        raise UserError(f"no item of the papers is called {shown(name)}: {hint}")
    return found
