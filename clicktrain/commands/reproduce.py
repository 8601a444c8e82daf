"""``clicktrain reproduce [ITEM]``: the papers' items, or one's runs and its figures beside the paper's."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clicktrain.commands.arguments import Command, Option, Positional, output_file
from clicktrain.errors import UserError
from clicktrain.formats.atomic import write_text_atomic

if TYPE_CHECKING:
    from clicktrain.papers import Measured, Overrides, Row, Setting, Step

_OPTIONS = (
    Option("scale", Literal["digits", "small", "paper"], "digits takes seconds and only shows that it runs; "
           "small is CIFAR-10 and a small network on a CPU; paper is the paper's own setting.", "small"),
    Option("epochs", int | None, "Length of every run, instead of the setting's.", metavar="N"),
    Option("data", str | None, "Data set of every run, instead of the setting's.", metavar="SPEC"),
    Option("flags", str, "Further flags of every run that trains, in one word: --flags='--device cuda'.", "",
           metavar="TEXT"),
    Option("seeds", tuple[int, ...], "Seeds of every run; several give means and standard deviations.",
           (0,), metavar="N [N ...]"),
    Option("out", str, "Folder of the runs: SCALE/ITEM/RUN-sSEED in it.", "runs/reproduce",
           metavar="DIR"),
    Option("dry_run", bool, "Print the commands, run nothing.", False),
    Option("json", str | None, "Also write the figures, or the items, to a file.", metavar="FILE"),
)  # fmt: skip
COMMAND = Command(
    name="reproduce",
    description="Without an item: every algorithm, equation, table, figure, network and data set of the "
    "papers, one a line, and whether it was run here. With one: run its commands, skip what is done, resume "
    "what was stopped, and put its figures beside the paper's.",
    groups={"this command": _OPTIONS},
    examples=(
        "clicktrain reproduce prunetrain/eq-3 --scale digits",
        "clicktrain reproduce 'campfire/table-*' --dry-run",
    ),
    footer="docs/papers.md has the same items with code, tests and results.",
    positional=Positional(
        "item", "An item, or a shell-style pattern; all are listed without.", optional=True
    ),
)
_STARTED = "command.json"


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = {option.name: option.default for option in _OPTIONS} | COMMAND.parse(argv)
    if given["epochs"] is not None and given["epochs"] < 1:
        raise UserError(f"epochs is {given['epochs']}: must be at least 1")
    seeds = given["seeds"]
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds are {' '.join(map(str, seeds)) or 'none'}: different numbers are needed")
    if given["json"] is not None:
        output_file("--json", given["json"])
    from clicktrain.papers import read_rows, rows_called

    if given.get("item") is None:
        return _list(list(read_rows().values()), given["json"])
    return _reproduce(rows_called(given["item"]), given)


def _list(rows: Sequence[Row], json_file: str | None) -> int:
    wide = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{row.name:<{wide}}  {row.kind}, {row.place}: {row.what}  [{row.state}]")
    counts = Counter(row.state.partition(":")[0] for row in rows)
    runnable = sum(row.runnable for row in rows)
    said = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    print(f"{len(rows)} items: {said}; {runnable} have commands for a CPU")
    if json_file is not None:
        keys = ("name", "kind", "place", "what", "state", "result", "not_run", "leaves", "code", "test")
        _write_json(json_file, [{key: getattr(row, key) for key in keys} for row in rows])
    return 0


def _reproduce(rows: Sequence[Row], given: dict[str, Any]) -> int:
    from clicktrain.commands.screen import warn
    from clicktrain.papers import Overrides, measured_figures, steps_of
    from clicktrain.papers.plan import setting_of

    overrides = Overrides(given["epochs"], given["data"], given["seeds"], given["flags"])
    scale, out = given["scale"], Path(given["out"]) / given["scale"]
    if len(rows) > 1:  # of several, those that can be run
        chosen = [row for row in rows if row.runs and (scale != "small" or row.runnable)]
        rows = [row for row in chosen if scale != "paper" or row.paper is not None]
        if not rows:
            raise UserError(f"none of these items has commands at the scale {scale}")
    plans = [(row, setting_of(row, scale), steps_of(row, scale, out, overrides)) for row in rows]
    if given["dry_run"]:
        for row, setting, steps in plans:
            print(f"# {row.name}: {row.what} ({_said(setting, scale, overrides)})")
            print(*(step.text for step in steps), sep="\n", flush=True)
        return 0
    results = []
    for row, setting, steps in plans:
        for step in steps:
            if (code := _carry_out(step)) != 0:
                warn("stopped; the same command goes on where it was")
                return code
        figures = measured_figures(row, steps)
        said = _said(setting, scale, overrides)
        _show(row, said, figures)
        results.append(_to_json(row, scale, said, steps, figures))
        if given["json"] is not None:
            _write_json(given["json"], results if len(plans) > 1 else results[0])
    return 0


def _carry_out(step: Step) -> int:
    """Run a step unless it is done; resume a run that was stopped. The exit code."""
    from clicktrain.runs.folder import RunFolder
    from clicktrain.runs.new_folder import CHECKPOINTS

    folder = RunFolder(step.output)
    if step.command[0] != "train":
        noted = step.output.with_suffix(f".{_STARTED}")
        _check_same(step, noted)
        if step.output.exists():
            print(f"{step.run}: done before, in {step.output}", flush=True)
            return 0
        code = _call(step, step.command)
        if code == 0:
            write_text_atomic(noted, json.dumps(step.command) + "\n")
        return code
    noted = step.output.parent / f"{step.output.name}.{_STARTED}"
    _check_same(step, noted)
    if folder.summary_path.exists():
        print(f"{step.run}: done before, in {step.output}", flush=True)
        return 0
    noted.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(noted, json.dumps(step.command) + "\n")
    if any((folder.path / CHECKPOINTS).glob("*")):
        return _call(step, ("resume", str(step.output), "--no-report"))
    return _call(step, (*step.command, "--no-report"))


def _check_same(step: Step, noted: Path) -> None:
    """Refuse to take the output of other settings for that of these."""
    if noted.is_file() and json.loads(noted.read_text(encoding="utf-8")) != list(step.command):
        raise UserError(
            f"{step.output} comes of another command than '{step.text}': give another --out, or remove it"
        )


def _call(step: Step, command: Sequence[str]) -> int:
    print(f"{step.run}: clicktrain {' '.join(command)}", flush=True)
    module = importlib.import_module(f"clicktrain.commands.{command[0]}")
    step.output.parent.mkdir(parents=True, exist_ok=True)
    if command[0] != "evaluate":
        code: int = module.run(command[1:])
        return code
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = module.run(command[1:])
    if code == 0:
        write_text_atomic(step.output, printed.getvalue())
    return code


def _said(setting: Setting | None, scale: str, changed: Overrides) -> str:
    """The setting in words, with what was replaced; one that is not the paper's is named as such."""
    if setting is None:
        return "on this machine"
    parts = [f"{changed.epochs} epochs"] if changed.epochs is not None else []
    parts += [part for part in (changed.data, changed.flags) if part]
    instead = f"; but {', '.join(parts)}" if parts else ""
    whose = "the paper's own setting" if scale == "paper" else "a smaller setting than the paper's"
    return f"{whose}: {setting.says}{instead}"


def _show(row: Row, said: str, figures: Sequence[Measured]) -> None:
    from clicktrain.commands.bench import print_table
    from clicktrain.commands.screen import PipeConsole

    cells = [(one.figure.what, _paper(one), _ours(one)) for one in figures]
    console = PipeConsole()
    console.print(f"\n{row.name}, {row.place}: {row.what}", markup=False, highlight=False)
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    if cells:
        print_table(console, "", ("", "paper", "here"), cells, whole_words=True)
    for label, text in (("differs", row.leaves), ("kept results", row.result)):
        if text:
            plain = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", r"\1 (docs/\2)", text)
            console.print(f"{label}: {plain}", markup=False, highlight=False)


def _paper(one: Measured) -> str:
    paper = one.figure.paper
    return paper if isinstance(paper, str) else with_unit(paper, one.figure.unit)


def _ours(one: Measured) -> str:
    if one.value is None:
        return f"- ({one.reason})"
    text = with_unit(one.value, one.figure.unit)
    if one.deviation is not None:
        text += f" (sd {one.deviation:.2g}, {one.seeds} seeds)"
    return text


def with_unit(value: float, unit: str) -> str:
    """A number as it is printed: two decimals for shares, ratios and differences, else four digits."""
    rounded = f"{value:.2f}" if unit in ("%", "points", "x") else f"{value:,.4g}"
    number = f"{value:,.0f}" if not unit and abs(value) >= 1e4 else rounded
    return f"{number}{unit}" if unit in ("%", "x") else f"{number} {unit}".rstrip()


def _to_json(
    row: Row, scale: str, said: str, steps: Sequence[Step], figures: Sequence[Measured]
) -> dict[str, Any]:
    return {
        "item": row.name,
        "what": row.what,
        "scale": scale,
        "setting": said,
        "commands": [step.text for step in steps],
        "figures": [one.to_json() for one in figures],
    }


def _write_json(file: str, value: Any) -> None:
    write_text_atomic(Path(file), json.dumps(value, indent=2) + "\n")
