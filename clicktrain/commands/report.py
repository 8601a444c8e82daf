"""``clicktrain report RUN... -o FILE``: one HTML file that shows and compares runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clicktrain.commands.arguments import Command, Option, Positional

_COMMAND = Command(
    name="report",
    description="Write one self-contained HTML file that shows a run, or compares several.",
    positional=Positional("runs", "Folders of the runs.", many=True),
    groups={
        "this command": (
            Option(
                "output",
                str | None,
                "The file; report.html in the run's folder by default, compare.html here for several runs.",
                short="-o",
                metavar="FILE",
            ),
        )
    },
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = _COMMAND.parse(argv)
    from clicktrain.report import write_report

    runs = [Path(text) for text in given["runs"]]
    default = runs[0] / "report.html" if len(runs) == 1 else Path("compare.html")
    output = given.get("output")
    print(write_report(runs, default if output is None else Path(output)))
    return 0
