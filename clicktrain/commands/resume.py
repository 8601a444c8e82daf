"""``clicktrain resume RUN``: continue a run from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clicktrain.commands.arguments import OWN_MODEL, Command, Option, Positional

_COMMAND = Command(
    name="resume",
    description="Continue a run from its newest checkpoint, to the same weights as if never interrupted.",
    positional=Positional("run", "Folder of the run."),
    groups={
        "this command": (
            OWN_MODEL,
            Option("report", bool, "Write report.html into the run's folder at the end.", True),
            Option("quiet", bool, "No progress, only the last line.", False),
        )
    },
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = _COMMAND.parse(argv)
    from clicktrain.commands.running import carry_out  # brings torch: not needed to find a wrong flag
    from clicktrain.train import RunFolder, load_run_config

    folder = RunFolder(Path(given["run"]))
    config, method = load_run_config(folder, given.get("model"))
    return carry_out(
        config, method, folder, quiet=given.get("quiet", False), report=given.get("report", True), resume=True
    )
