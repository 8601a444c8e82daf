"""What may be typed where on the command line, from the declarations of all commands."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from clicktrain.commands.arguments import Command, Option, words_of
from clicktrain.commands.bench import BENCHMARKS
from clicktrain.commands.catalog import every_command
from clicktrain.methods import METHODS
from clicktrain.models.registry import list_models
from clicktrain.train import RunConfig

DEFAULT_METHOD = RunConfig.method
LONGEST_HELP = 90
SHELLS = ("bash", "zsh", "fish")
_FOLDERS = frozenset(("run", "runs", "folders", "initial_weights", "teacher", "cache_dir"))
"""Flags and arguments whose values are folders, besides those that say DIR or RUN."""


@dataclass(frozen=True)
class Value:
    """What may follow a flag, or stand for an argument without one: ``words``, a path, or any text."""

    kind: Literal["switch", "words", "file", "folder", "text"]
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flag:
    """A flag, what it is for in a few words, and its value; a switch has a second one, --no-FLAG."""

    flag: str
    help: str
    value: Value
    short: str | None = None

    @property
    def negated(self) -> str | None:
        """The flag that turns a switch off."""
        return f"--no-{self.flag[2:]}" if self.value.kind == "switch" else None


@dataclass(frozen=True)
class Place:
    """What may be typed after a command.

    ``name`` is COMMAND, or train/METHOD and bench/BENCHMARK, whose flags depend on a word of the line.
    """

    name: str
    flags: tuple[Flag, ...]
    argument: Value | None = None

    @property
    def command(self) -> str:
        """The first word."""
        return self.name.partition("/")[0]

    @property
    def words(self) -> dict[str, str]:
        """All that begins with a dash, with what it is for."""
        words = {one.flag: one.help for one in self.flags}
        words |= {one.negated: f"not: {one.help}" for one in self.flags if one.negated}
        words |= {one.short: one.help for one in self.flags if one.short}
        return {**words, "--help": "what can be given", "--help-all": "all of it at length"}


def all_places() -> tuple[Place, ...]:
    """Every place of the command line, in the order of its help."""
    return tuple(
        Place(_name(name, command), tuple(_flags(command)), _argument(command))
        for name, commands in every_command().items()
        for command in commands
    )


def _name(name: str, command: Command) -> str:
    if name == "train":
        title = next(head for head in command.groups if head.startswith("settings of method "))
        return f"train/{title.rpartition(' ')[2]}"
    return command.name.replace(" ", "/")


def _flags(command: Command) -> Iterator[Flag]:
    for option in command.options.values():
        words = re.split(r"(?<=\w\w)\. |; | \(", option.help)[0].strip().rstrip(".")
        words = textwrap.shorten(words, LONGEST_HELP, placeholder=" ...")
        yield Flag(option.flag, words, _value(option), option.short)


def _value(option: Option) -> Value:
    if option.name == "method":
        return Value("words", tuple(METHODS))
    if option.name == "model" and option.metavar != "NAME":  # else one of the user's own
        return Value("words", list_models())
    if words := words_of(option):
        return Value("switch") if set(words) == {"true", "false"} else Value("words", words)
    metavar = option.metavar or ""
    if metavar.startswith(("DIR", "RUN")) or option.name in _FOLDERS:
        return Value("folder")
    return Value("file" if metavar.startswith("FILE") else "text")


def _argument(command: Command) -> Value | None:
    if command.positional is None:
        return None
    name = command.positional.name
    known = {"method": tuple(METHODS), "shell": SHELLS, "what": tuple(BENCHMARKS)}
    if name in known:
        return Value("words", known[name])
    return Value("folder") if name in _FOLDERS else Value("file" if name == "recipe" else "text")
