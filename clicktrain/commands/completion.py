"""``clicktrain completion SHELL``: a script that completes commands, flags and their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from clicktrain.commands.arguments import Command, Positional
from clicktrain.errors import UserError

COMMAND = Command(
    name="completion",
    description="Print a completion script for a shell: commands, flags (those of the method on the line) "
    "and the words that they take. It starts no Python when tab is pressed; write it again after an update.",
    positional=Positional("shell", "bash, zsh or fish."),
    groups={},
    examples=(
        "clicktrain completion bash > ~/.local/share/bash-completion/completions/clicktrain",
        "clicktrain completion zsh > ~/.zfunc/_clicktrain   # in .zshrc: fpath+=~/.zfunc, before compinit",
        "clicktrain completion fish > ~/.config/fish/completions/clicktrain.fish",
    ),
    footer="Or for this shell alone: source <(clicktrain completion bash).",
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    shell = COMMAND.parse(argv)["shell"]
    from clicktrain.commands.shells import Shell, completion_script

    if shell not in get_args(Shell):
        raise UserError(f"shell is {shell!r}: use one of {', '.join(get_args(Shell))}")
    print(completion_script(shell), end="")
    return 0
