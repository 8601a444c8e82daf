"""Every command with its flags, for completion and for tests that hold for all commands."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from clicktrain.cli import COMMANDS
from clicktrain.commands.arguments import Command


def commands_of(name: str) -> Sequence[Command]:
    """What one of `clicktrain.cli.COMMANDS` takes.

    Several where its flags depend on its words: ``train``, by method; ``bench``, without and with each
    benchmark. A module has ``COMMAND``, or ``commands()`` where they do.
    """
    module = importlib.import_module(f"clicktrain.commands.{name}")
    if hasattr(module, "commands"):
        several: Sequence[Command] = module.commands()
        return several
    one: Command = module.COMMAND
    return (one,)


def every_command() -> dict[str, Sequence[Command]]:
    """Command -> what it takes, in the order of the help."""
    return {name: commands_of(name) for name in COMMANDS}
