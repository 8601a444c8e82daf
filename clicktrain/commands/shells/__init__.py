"""Completion scripts for bash, zsh and fish, written from the flags that commands declare.

A script is complete in itself: pressing tab starts no Python. What may be typed after ``clicktrain train`` is
that of the method on the line.
"""

from __future__ import annotations

from typing import Literal

from clicktrain.commands.shells.bourne import bash_script, zsh_script
from clicktrain.commands.shells.fish import fish_script
from clicktrain.commands.shells.table import all_places

Shell = Literal["bash", "zsh", "fish"]


def completion_script(shell: Shell) -> str:
    """The script for a shell, to be sourced by it."""
    return {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}[shell](all_places())
