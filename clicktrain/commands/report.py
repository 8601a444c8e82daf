"""``clicktrain report RUN... -o FILE``: one HTML file that shows and compares runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clicktrain.commands.arguments import Command, Option, Positional
from clicktrain.errors import UserError

COMMAND = Command(
    name="report",
    description="Write one self-contained HTML file that shows a run, or compares several, finished or not.",
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
            Option(
                "watch",
                bool,
                "Write it again while the runs go on, until all are finished; a browser keeps up.",
                False,
            ),
            Option("every", int, "Seconds between two versions, with --watch.", 10, metavar="N"),
        )
    },
    examples=(
        "clicktrain report runs/first",
        "clicktrain report runs/dense runs/first -o compare.html",
        "clicktrain report runs/first --watch --every 30",
    ),
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = COMMAND.parse(argv)
    watch, seconds = given.get("watch", False), given.get("every", 10)
    if "every" in given and not watch:
        raise UserError("--every is of --watch: give that too")
    if not 1 <= seconds <= 86_400:
        raise UserError(f"every is {seconds}: 1 to 86400 seconds are possible")
    from clicktrain.commands.screen import warn
    from clicktrain.report import watch_report, write_report

    runs = [Path(text) for text in given["runs"]]
    default = runs[0] / "report.html" if len(runs) == 1 else Path("compare.html")
    output = default if given.get("output") is None else Path(given["output"])
    if not watch:
        print(write_report(runs, output))
        return 0
    try:
        print(watch_report(runs, output, warn, seconds=seconds))
    except KeyboardInterrupt:  # how watching usually ends
        print(write_report(runs, output))
    return 0
