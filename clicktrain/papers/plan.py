"""The command lines of a row: at which scale, with what of its settings replaced, into which folders.

A run of a row is a command of the command line without its place: ``train --method dense``. In it

- ``{30%}`` is that share of the run's epochs, rounded, at least 1 unless it is 0%: ``--era {30%} {50%}``;
- ``{dense}`` is the folder of the row's run ``dense``, of the same seed.

``train`` gets the recipe and flags of the setting and a folder, ``bench``, ``cost`` and ``evaluate`` a
file for JSON.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from clicktrain.errors import UserError, shown
from clicktrain.files import find_recipe, read_yaml
from clicktrain.papers.rows import Row, Setting, read_settings, trains

SCALES = ("digits", "small", "paper")
"""Handwritten digits, in seconds; CIFAR-10 and a small network on a CPU; the paper's own setting."""
QUICK = "digits"
"""The setting of the scale of that name, for every row."""

_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Overrides:
    """What of a row's setting is replaced.

    Attributes:
        epochs: length of every run that trains.
        data: the data set of every run that trains.
        seeds: of the runs that train; more than one gives means and deviations.
        flags: further flags of every run that trains, as typed.
    """

    epochs: int | None = None
    data: str | None = None
    seeds: Sequence[int] = (0,)
    flags: str = ""


@dataclass(frozen=True)
class Step:
    """One command of a row.

    Attributes:
        run: its name in the row.
        seed: of a run that trains or reads one that does; None for others.
        command: the command line without ``clicktrain``.
        output: the folder of the run, or the file of its JSON.
    """

    run: str
    seed: int | None
    command: tuple[str, ...]
    output: Path

    @property
    def text(self) -> str:
        """The command line as it is typed."""
        command = self.command
        if command[0] == "evaluate":  # prints its JSON
            return f"clicktrain {shlex.join(command)} > {shlex.quote(str(self.output))}"
        return f"clicktrain {shlex.join(command)}"


def setting_of(row: Row, scale: str) -> Setting | None:
    """The setting of a row at a scale; None for commands that train nothing.

    Raises:
        UserError: the row has none at this scale, with what there is.
    """
    if not row.runs:
        reason = f"not run: {row.not_run}" if row.not_run else f"it is held by tests: {', '.join(row.test)}"
        raise UserError(f"{row.name} has no command; {reason}")
    if not trains(row.runs):
        return None
    name = {"digits": QUICK, "small": row.small, "paper": row.paper}[scale]
    if name is None:
        having = [one for one, key in (("digits", QUICK), ("small", row.small), ("paper", row.paper)) if key]
        because = f" ({row.not_run})" if row.not_run and scale == "small" else ""
        raise UserError(f"{row.name} has no {scale} setting{because}: use --scale {' or '.join(having)}")
    return read_settings()[name]


@dataclass(frozen=True)
class _Place:
    row: Row
    scale: str
    setting: Setting | None
    out: Path
    overrides: Overrides

    def output(self, run: str, seed: int | None) -> Path:
        end = "" if seed is None else f"-s{seed}"
        return self.out / self.row.name / f"{run}{end}{'' if self._trains(run) else '.json'}"

    def _trains(self, run: str) -> bool:
        return self.row.runs[run].split()[0] == "train"


def steps_of(row: Row, scale: str, out: Path, overrides: Overrides | None = None) -> list[Step]:
    """The commands of a row, in the order in which they have to be run.

    Args:
        row: see `clicktrain.papers.rows`.
        scale: one of `SCALES`.
        out: folder below which all outputs go, in ``PAPER/ITEM/RUN-sSEED``.
        overrides: what of the setting is replaced.

    Raises:
        UserError: the row has no commands at this scale.
    """
    overrides = overrides or Overrides()
    place = _Place(row, scale, setting_of(row, scale), out, overrides)
    steps = []
    for seed in overrides.seeds:
        for run, text in row.runs.items():
            seeded = _seeded(row, run)
            if seeded or seed == overrides.seeds[0]:
                own = seed if seeded else None
                steps.append(Step(run, own, _command(place, run, text, own), place.output(run, own)))
    return steps


def _seeded(row: Row, run: str) -> bool:
    """Whether a run depends on the seed: it trains, or reads one that does."""
    words = row.runs[run].split()
    return words[0] == "train" or any(name in row.runs for name in _PLACEHOLDER.findall(row.runs[run]))


def _command(place: _Place, run: str, text: str, seed: int | None) -> tuple[str, ...]:
    words = shlex.split(text)
    output = place.output(run, seed)
    if words[0] == "train":
        setting = place.setting
        assert setting is not None
        given = [*shlex.split(setting.flags), *words[1:]]
        if place.scale == "digits":
            given += shlex.split(place.row.digits.get(run, ""))
        if place.overrides.epochs is not None:
            given += ["--epochs", str(place.overrides.epochs)]
        if place.overrides.data is not None:
            given += ["--data", place.overrides.data]
        recipe = setting.recipe
        given += shlex.split(place.overrides.flags)
        epochs, warm_up = _length(recipe, given)
        if warm_up is not None:
            given += ["--warmup-epochs", f"{warm_up:g}"]
        command = ["train", "--config", recipe, *given, "--seed", str(seed), "--out", str(output)]
    else:
        epochs = 0
        extra = shlex.split(place.row.digits.get(run, "")) if place.scale == "digits" else []
        command = [*words, *extra, "--json", *([] if words[0] == "evaluate" else [str(output)])]

    def replaced(match: re.Match[str]) -> str:
        name = match[1]
        if name.endswith("%"):
            share = float(name[:-1]) / 100
            return str(max(round(share * epochs), 1 if share else 0))
        if name not in place.row.runs:
            raise UserError(f"{place.row.name}, {run}: there is no run {shown(name)}")
        return str(place.output(name, seed))

    return tuple(_PLACEHOLDER.sub(replaced, word) for word in command)


def _length(recipe: str, given: Sequence[str]) -> tuple[int, float | None]:
    """Epochs of a run, and those of its warm-up where they follow a length that is not the recipe's."""
    usual, warm_up = _usual_length(find_recipe(recipe).absolute())
    epochs = int(_last(given, "--epochs") or usual)
    follows = epochs != usual and warm_up > 0 and _last(given, "--warmup-epochs") is None
    return epochs, warm_up * epochs / usual if follows else None


@lru_cache(maxsize=64)
def _usual_length(recipe: Path) -> tuple[int, float]:
    """Epochs of a recipe, and of its warm-up."""
    values: dict[str, Any] = read_yaml(recipe)
    return int(values["epochs"]), float(values.get("warmup_epochs", 0))


def _last(given: Sequence[str], flag: str) -> str | None:
    """The last value of a flag among words."""
    places = [number for number, word in enumerate(given) if word == flag]
    return given[places[-1] + 1] if places else None
