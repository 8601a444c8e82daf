"""``clicktrain frontier RECIPE``: a grid of dense and pruned runs, and accuracy against what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clicktrain.commands.arguments import Command, Option, Positional
from clicktrain.errors import UserError
from clicktrain.wording import clock

if TYPE_CHECKING:
    from clicktrain.bench.frontier.lines import Line
    from clicktrain.bench.frontier.recipe import Recipe
    from clicktrain.bench.frontier.runs import Job

_TRAINING = (
    Option("out", str | None, "Folder of the runs, NAME/seed-S; runs/frontier-FAMILY by default.",
           metavar="DIR"),
    Option("jobs", int, "Runs at a time.", 1, metavar="N"),
    Option("only", tuple[str, ...], "Only train runs whose name fits one of these (shell-style).", (),
           metavar="PATTERN [...]"),
    Option("dry_run", bool, "List the runs and their time, about; train nothing.", False),
    Option("train", bool, "Train what is not done; --no-train only draws.", True),
)  # fmt: skip
_TIMING = (
    Option("time", bool, "Train nothing, but time all networks of finished runs on this machine.", False),
    Option("rounds", int, "Timings of which the median is taken.", 7, metavar="N"),
    Option("alone", bool, "Also planning and peak memory, in processes of their own.", True),
)
_FILES = (
    Option("results", str | None, "File of one line per run, which machines may share; results.jsonl in the "
           "folder by default.", metavar="FILE"),
    Option("times", str | None, "File of the times; times.json in the folder by default.", metavar="FILE"),
    Option("json", str | None, "Also write the points as JSON.", metavar="FILE"),
    Option("output", str | None, "The page; frontier.html in the folder by default. The table is beside it, "
           "as .md.", short="-o", metavar="FILE"),
    Option("accuracy", Literal["test", "holdout"], "The images that count: holdout while choosing settings.",
           "test"),
)  # fmt: skip
COMMAND = Command(
    name="frontier",
    description="Train a grid of dense and pruned networks from a recipe, several seeds each, and draw "
    "accuracy against training time, latency, FLOPs and bytes. What is done is skipped, what was killed is "
    "resumed.",
    examples=(
        "clicktrain frontier recipes/frontier-cifarnet.yaml --dry-run",
        "clicktrain frontier recipes/frontier-cifarnet.yaml --only 'dense*' --jobs 2",
    ),
    positional=Positional("recipe", "YAML file, see docs/frontier.md."),
    groups={"training": _TRAINING, "timing": _TIMING, "files": _FILES},
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = {option.name: option.default for option in (*_TRAINING, *_TIMING, *_FILES)}
    given |= COMMAND.parse(argv)
    for name in ("jobs", "rounds"):
        if given[name] < 1:
            raise UserError(f"{name} is {given[name]}: must be at least 1")
    from clicktrain.bench.frontier.lines import read_lines
    from clicktrain.bench.frontier.recipe import read_recipe
    from clicktrain.bench.frontier.runs import jobs_of

    recipe = read_recipe(given["recipe"])
    chosen = recipe.only(given["only"])
    out = Path(given["out"] or Path("runs") / f"frontier-{recipe.family}")
    results = Path(given["results"] or out / "results.jsonl")
    times = Path(given["times"] or out / "times.json")
    lines = read_lines(results)
    jobs = jobs_of(chosen, lines)
    if given["dry_run"]:
        return _dry_run(jobs)
    code = 0
    if given["time"]:
        _time(recipe, lines, times, given)
    elif given["train"]:
        code = _train(jobs, out, results, lines, given["jobs"])
    _draw(recipe, lines, times, out, given)
    return code


def _train(
    jobs: Sequence[Job], out: Path, results: Path, lines: dict[tuple[str, int], Line], processes: int
) -> int:
    from clicktrain.bench.frontier.runs import GridInterrupted, run_grid
    from clicktrain.commands.screen import warn

    say = _speaker(f"the runs go on without it, in {out}")
    try:
        problems = run_grid(jobs, out=out, results=results, lines=lines, processes=processes, progress=say)
    except GridInterrupted as stop:
        warn("stopped; the same command goes on where it was")
        return stop.exit_code
    for problem in problems:
        warn(problem)
    return 2 if problems else 0


def _time(recipe: Recipe, lines: dict[tuple[str, int], Line], path: Path, given: dict[str, Any]) -> None:
    from clicktrain.bench.frontier.page import json_text, write
    from clicktrain.bench.frontier.timing import TimingSettings, measure_times

    settings = TimingSettings(rounds=given["rounds"], alone=given["alone"])

    def save(times: dict[str, Any]) -> None:
        write(path, json_text(times))

    save(measure_times(recipe, lines, settings, _speaker("timing goes on without it"), save))


def _speaker(goes_on: str) -> Callable[[str], None]:
    """A function that prints a line, and does nothing once nobody reads it."""
    from clicktrain.commands.screen import lasting_console

    console = lasting_console(goes_on)
    return partial(console.print, markup=False, highlight=False, soft_wrap=True)


def _draw(
    recipe: Recipe, lines: dict[tuple[str, int], Line], times: Path, out: Path, given: dict[str, Any]
) -> None:
    from clicktrain.bench.frontier import page
    from clicktrain.bench.frontier.points import points_of, read_times
    from clicktrain.bench.frontier.runs import jobs_of

    measured = read_times(times)
    data = page.FrontierData(
        recipe.family,
        tuple(points_of(recipe, lines, measured, given["accuracy"])),
        measured,
        len(jobs_of(recipe.cells, lines)),
    )
    shown = Path(given["output"] or out / "frontier.html")
    page.write(shown, page.to_html(data))
    page.write(shown.with_suffix(".md"), page.to_markdown(data))
    if given["json"] is not None:
        page.write(Path(given["json"]), page.json_text(page.to_json(data)))
    if data.note:
        print(data.note)
    print(shown)


def _dry_run(jobs: Sequence[Job]) -> int:
    from clicktrain.bench.frontier.timing import expected_seconds

    total = 0.0
    for job in jobs:
        seconds = expected_seconds(job.cell.config(job.seed)[0])
        total += seconds
        print(f"{clock(seconds)}  {job.name}", flush=True)
    print(f"{clock(total)}  {len(jobs)} runs on one core, if all were dense; evaluation left out")
    return 0
