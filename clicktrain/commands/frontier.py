"""``clicktrain frontier RECIPE``: a grid of dense and pruned runs, and accuracy against what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clicktrain.commands.arguments import Command, Option, Positional
from clicktrain.errors import UserError

_OPTIONS = (
    Option("out", str | None, "Folder of the runs, NAME/seed-S; runs/frontier-FAMILY by default.",
           metavar="DIR"),
    Option("jobs", int, "Runs at a time.", 1, metavar="N"),
    Option("only", tuple[str, ...], "Only runs whose name fits one of these (shell-style).", (),
           metavar="PATTERN [...]"),
    Option("dry_run", bool, "List the runs and their time, about; train nothing.", False),
    Option("train", bool, "Train what is not done; --no-train only draws.", True),
    Option("results", str | None, "File of one line per run, which may be committed and shared by machines; "
           "results.jsonl in the folder by default.", metavar="FILE"),
)  # fmt: skip
_COMMAND = Command(
    name="frontier",
    description="Train a grid of dense and pruned networks from a recipe, several seeds each, and draw "
    "accuracy against training time, latency, FLOPs and bytes. What is done is skipped, what was killed is resumed.",
    positional=Positional("recipe", "YAML file, see docs/frontier.md."),
    groups={"this command": _OPTIONS},
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = {option.name: option.default for option in _OPTIONS} | _COMMAND.parse(argv)
    if given["jobs"] < 1:
        raise UserError(f"jobs is {given['jobs']}: must be at least 1")
    from clicktrain.bench.frontier.lines import read_lines
    from clicktrain.bench.frontier.recipe import read_recipe
    from clicktrain.bench.frontier.runs import jobs_of

    recipe = read_recipe(given["recipe"])
    cells = recipe.only(given["only"])
    out = Path(given["out"] or Path("runs") / f"frontier-{recipe.family}")
    results = Path(given["results"] or out / "results.jsonl")
    lines = read_lines(results)
    jobs = jobs_of(cells, lines)
    if given["dry_run"]:
        return _dry_run(jobs)
    if given["train"]:
        return _train(jobs, out, results, lines, given["jobs"])
    return 0


def _train(jobs: Sequence[Any], out: Path, results: Path, lines: dict[Any, Any], processes: int) -> int:
    from clicktrain.bench.frontier.runs import GridInterrupted, run_grid
    from clicktrain.commands.screen import lasting_console, warn

    console = lasting_console(f"the runs go on without it, in {out}")

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    try:
        problems = run_grid(jobs, out=out, results=results, lines=lines, processes=processes, progress=say)
    except GridInterrupted as stop:
        warn("stopped; the same command goes on where it was")
        return stop.exit_code
    for problem in problems:
        warn(problem)
    return 2 if problems else 0


def _dry_run(jobs: Sequence[Any]) -> int:
    for job in jobs:
        print(job.name)
    print(f"{len(jobs)} runs")
    return 0
