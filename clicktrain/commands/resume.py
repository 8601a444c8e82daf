"""``clicktrain resume RUN``: continue a run from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from clicktrain.comm.processes import TIMEOUT_S
from clicktrain.commands.arguments import OWN_MODEL, QUIET, REPORT, RUN, Command, Option
from clicktrain.commands.processes import PROCESSES, check, start, without

_COMMAND = Command(
    name="resume",
    description="Continue a run from its newest checkpoint, to the same weights as if never interrupted.",
    positional=RUN,
    examples=(
        "clicktrain resume runs/first",
        "clicktrain resume runs/mine --model mynet:build",
    ),
    groups={
        "this command": (
            OWN_MODEL,
            replace(REPORT, main=True),
            replace(QUIET, main=True),
            *PROCESSES,
            Option(
                "parts",
                int | None,
                "Divide batches into another number of parts from here on: batch norm statistics are those "
                "of a part. By default they stay as they are, whatever number of processes goes on.",
                metavar="N",
                main=False,
            ),
        )
    },
)


def command() -> Command:
    """The command, with a flag for every choice that may be code of somebody's own."""
    text = "The run's, if it is code of your own: package.module:function."
    own = [Option(name, str | None, text, metavar="NAME", main=False) for name in _own_choices()]
    note = "A function of your own that the run uses has to be named again, as package.module:function."
    return replace(
        _COMMAND, groups={**_COMMAND.groups, "code of your own": own}, notes={"code of your own": [note]}
    )


def commands() -> Sequence[Command]:
    """The command, for completion."""
    return (command(),)


def _own_choices() -> list[str]:
    from clicktrain.methods import METHODS
    from clicktrain.settings import choice_fields

    return sorted({name for method in METHODS.values() for name in choice_fields(method)})


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    from clicktrain.commands.progress import carry_out
    from clicktrain.train import RunFolder, load_run_config

    given = command().parse(argv)
    processes, restarts = given.get("processes", 1), given.get("restarts", 0)
    check(processes, restarts, given.get("process_timeout", TIMEOUT_S))
    if processes > 1:
        return start("resume", without(argv), processes, restarts)
    folder = RunFolder(Path(given["run"]))
    named = {name: given[name] for name in _own_choices() if given.get(name) is not None}
    config, method = load_run_config(folder, given.get("model"), named)
    if given.get("parts") is not None:
        config = replace(config, parts=given["parts"])
    return carry_out(
        config,
        method,
        folder,
        quiet=given.get("quiet", False),
        report=given.get("report", True),
        resume=True,
        process_timeout=given.get("process_timeout", TIMEOUT_S),
    )
