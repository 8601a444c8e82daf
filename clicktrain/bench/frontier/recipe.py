"""The recipe of a frontier: which runs, dense and pruned, with which settings and seeds."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from clicktrain.errors import UserError, shown
from clicktrain.methods import Method
from clicktrain.own_code import is_own
from clicktrain.settings import convert
from clicktrain.train.config import RunConfig, code_settings, from_dict, read_settings

Kind = Literal["dense", "pruned"]
ENGINES = ("fp32", "bf16")
"""Ways to run a dense network that are measured by default, of which the fastest counts; ``compile``, in the
faster of these, takes minutes per network."""
MOST_RUNS = 10_000

_KEYS = ("family", "base", "seeds", "dense", "pruned", "engines")
_GROUP_KEYS = ("setting", "method", "width", "widths", "epochs", "seeds", "after", "settings")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_REFUSED = {
    "initial_weights": "name the cell that it starts from by 'after', so that its cost counts",
    "teacher": "what it cost would not count; distill alone has the run's own network teach",
    "test_time_augmentation": "accuracy would not be that of the prediction that is timed",
}
_PLACED = {"width": "widths", "epochs": "epochs", "seed": "seeds", "method": "method"}
"""Settings that a recipe says by keys of its own."""


@dataclass(frozen=True)
class Cell:
    """A point of the grid: one network trained in one way, once per seed.

    Attributes:
        name: unique, and the name of a folder.
        setting: what distinguishes the method's settings, in a word.
        settings: flat settings of the run and its method as the recipe has them, without the seed.
        after: name of the cell whose network, of the same seed, this one starts from.
    """

    name: str
    kind: Kind
    method: str
    setting: str
    width: float
    epochs: int
    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    after: str | None = None

    def config(self, seed: int, initial_weights: str | None = None) -> tuple[RunConfig, Method[Any]]:
        """Settings of one run; UserError where they are no settings."""
        start = {} if initial_weights is None else {"initial_weights": initial_weights}
        return from_dict({**self.settings, **start, "seed": seed})


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; see `read_recipe`."""

    family: str
    cells: tuple[Cell, ...]
    engines: tuple[str, ...] = ENGINES

    def cell(self, name: str) -> Cell:
        """The cell of a name."""
        return next(cell for cell in self.cells if cell.name == name)

    def only(self, patterns: Sequence[str]) -> tuple[Cell, ...]:
        """The cells whose name, or ``NAME/seed-S``, fits one of the patterns (shell-style), with their seeds.

        UserError if a pattern fits none.
        """
        if not patterns:
            return self.cells
        chosen = []
        for cell in self.cells:
            seeds = tuple(
                seed for seed in cell.seeds
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns
                       for name in (cell.name, run_name(cell, seed)))
            )  # fmt: skip
            if seeds:
                chosen.append(replace(cell, seeds=seeds))
        for pattern in patterns:
            if not any(
                fnmatch.fnmatchcase(name, pattern)
                for cell in chosen
                for name in (cell.name, *(run_name(cell, seed) for seed in cell.seeds))
            ):
                raise UserError(f"no run is called {shown(pattern)}: --dry-run lists the runs")
        return tuple(chosen)


def run_name(cell: Cell, seed: int) -> str:
    """Name of a run below the folder of its frontier."""
    return f"{cell.name}/seed-{seed}"


def read_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe; its format is in docs/frontier.md.

    Raises:
        UserError: not YAML, an unknown key, a value that does not fit, settings that no run can have, or two
            cells of one name.
    """
    values = read_settings(path)
    try:
        return parse_recipe(values, Path(path).stem.removeprefix("frontier-"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def parse_recipe(values: Mapping[Any, Any], family: str) -> Recipe:
    """The recipe in a mapping, of this family unless it names another; errors as `read_recipe`."""
    _check_keys(values, _KEYS, "a recipe")
    base = _settings(values.get("base"), "base")
    for key, instead in _PLACED.items():
        if key in base:
            raise UserError(f"base has {key}: a recipe says that by {instead} of 'dense' and 'pruned'")
    seeds = _many("seeds", values.get("seeds", [0]), int)
    groups: list[tuple[Kind, Mapping[Any, Any]]] = []
    for kind in ("dense", "pruned"):
        given = values.get(kind) or []
        for group in [given] if isinstance(given, Mapping) else given if isinstance(given, list) else [None]:
            if not isinstance(group, Mapping):
                raise UserError(f"{kind} is {shown(group or given)}: a mapping is needed, or a list of them")
            groups.append((kind, group))
    if not groups:
        raise UserError("there is nothing to train: it has neither 'dense' nor 'pruned'")
    cells = [cell for kind, group in groups for cell in _cells(kind, group, base, seeds)]
    _check_cells(cells)
    engines = _many("engines", values.get("engines", list(ENGINES)), str)
    for engine in engines:
        convert("engines", engine, Literal["fp32", "bf16", "compile"])
    name = values.get("family", family)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"family is {shown(name)}: a word of letters, digits and .+_- is needed")
    return Recipe(name, tuple(cells), engines)


def _cells(
    kind: Kind, group: Mapping[Any, Any], base: Mapping[str, Any], seeds: tuple[int, ...]
) -> list[Cell]:
    _check_keys(group, _GROUP_KEYS, f"'{kind}'")
    method = "dense" if kind == "dense" else group.get("method")
    if not isinstance(method, str) or (kind == "pruned" and method == "dense"):
        raise UserError(f"method is {shown(method)} in 'pruned': name one that prunes")
    if kind == "dense" and group.get("method", "dense") != "dense":
        raise UserError(f"method is {shown(group['method'])} in 'dense': write it under 'pruned'")
    setting = group.get("setting", method)
    if not isinstance(setting, str) or not _NAME.fullmatch(setting):
        raise UserError(f"setting is {shown(setting)}: a word of letters, digits and .+_- is needed")
    if "width" in group and "widths" in group:
        raise UserError(f"{setting} has width and widths: give one of them")
    widths = _many("widths", group.get("widths", group.get("width", [1.0])), float)
    lengths = _many("epochs", group.get("epochs", [RunConfig.epochs]), int)
    own_seeds = _many("seeds", group["seeds"], int) if "seeds" in group else seeds
    after = group.get("after")
    if after is not None and not isinstance(after, str):
        raise UserError(f"after is {shown(after)} in {setting}: the name of a run's cell is needed")
    own = _settings(group.get("settings"), "settings")
    for key, instead in _PLACED.items():
        if key in own:
            raise UserError(f"settings of {setting} have {key}: write it as {instead} beside them")
    return [
        Cell(
            f"{setting}-w{width:g}-e{epochs}", kind, method, setting, width, epochs, own_seeds,
            {"threads": 1, **base, **own, "method": method, "width": width, "epochs": epochs}, after,
        )
        for width in widths for epochs in lengths
    ]  # fmt: skip


def _check_cells(cells: Sequence[Cell]) -> None:
    by_name: dict[str, Cell] = {}
    if sum(len(cell.seeds) for cell in cells) > MOST_RUNS:
        raise UserError(f"that is more than {MOST_RUNS:,} runs: make the grid smaller")
    for cell in cells:
        if cell.name in by_name:
            raise UserError(f"two cells are called {cell.name}: give one of them another 'setting'")
        by_name[cell.name] = cell
        for name in code_settings(cell.settings):
            if is_own(cell.settings.get(name)):
                raise UserError(
                    f"{name} is {shown(cell.settings[name])}: a frontier runs what the library has, "
                    "no code of one's own"
                )
        try:
            config, _ = cell.config(cell.seeds[0])
        except UserError as error:
            raise UserError(f"{cell.name}: {error}") from None
        for name, why in _REFUSED.items():
            if getattr(config, name) not in (None, "none"):
                raise UserError(f"{cell.name} sets {name}: {why}")
        if config.dynamic_batch:
            raise UserError(f"{cell.name}: dynamic_batch is true, but times of steps need one batch size")
    for cell in cells:
        if cell.after is None:
            continue
        first = by_name.get(cell.after)
        if first is None or first.after is not None or first is cell:
            raise UserError(f"{cell.name} is to start after {cell.after}: name a cell that starts fresh")
        if missing := set(cell.seeds) - set(first.seeds):
            raise UserError(f"{cell.name} starts after {cell.after}, which has no seed {min(missing)}")


def _check_keys(values: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise UserError(f"{where} has no key {shown(key)}: there are {', '.join(known)}")


def _settings(values: object, where: str) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{where} is {shown(values)}: settings are needed, one 'setting: value' a line")
    return dict(values)


def _many(name: str, value: object, kind: type) -> Any:
    """One value or a list of different ones, as a tuple."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise UserError(f"{name} is empty: at least one value is needed")
    typed = tuple(convert(name, item, kind) for item in items)
    if len(set(typed)) < len(typed):
        raise UserError(f"{name} is {shown(value)}: a value is there twice")
    return typed
