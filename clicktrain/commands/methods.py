"""``clicktrain methods [NAME]``: the pruning methods, or the settings of one."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from clicktrain.commands.arguments import JSON, Command, Positional, options_of, words_of
from clicktrain.errors import UserError
from clicktrain.wording import table_lines

COMMAND = Command(
    name="methods",
    description="The pruning methods, one a line; with a name, what it does and all its settings.",
    positional=Positional("method", "A method; all are listed without.", optional=True),
    groups={"this command": (JSON,)},
    examples=("clicktrain methods", "clicktrain methods rigl", "clicktrain methods --json"),
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = COMMAND.parse(argv)
    from clicktrain.methods import METHODS

    name = given["method"]
    if name is not None and name not in METHODS:
        raise UserError(f"method is {name!r}: use one of {', '.join(METHODS)}")
    if given.get("json"):
        print(json.dumps(describe(name) if name else [describe(key) for key in METHODS], indent=2))
    elif name is not None:
        from clicktrain.commands.train import command_of

        print(command_of(name, alone=True).help(every=True))
    else:
        rows = [[key, cls.title, _summary(cls)] for key, cls in METHODS.items()]
        print("\n".join(table_lines([["method", "written", "what it does"], *rows])))
        print("\n'clicktrain methods NAME' explains the settings of one.")
    return 0


def describe(name: str) -> Mapping[str, Any]:
    """A method as plain values: what it does, and its settings with default, choices and meaning."""
    from clicktrain.commands.train import example_of
    from clicktrain.methods import METHODS

    cls = METHODS[name]
    settings = [
        {
            "name": option.name,
            "flag": option.flag,
            "default": list(option.default) if isinstance(option.default, tuple) else option.default,
            "choices": list(words_of(option)) or None,
            "help": option.help,
        }
        for option in options_of(cls)
    ]
    return {
        "name": name,
        "title": cls.title,
        "summary": _summary(cls),
        "description": " ".join((cls.__doc__ or "").split()),
        "needs_trained_weights": cls().expects_trained,
        "removes_channels": cls.reads_graph,
        "freezes_masks": cls.freezes,
        "alternatives": [list(group) for group in cls.alternatives],
        "example": example_of(name),
        "settings": settings,
    }


def _summary(cls: type) -> str:
    """The first paragraph of a method's documentation."""
    return " ".join(textwrap.dedent(cls.__doc__ or "").strip().split("\n\n")[0].split()).rstrip(".")
