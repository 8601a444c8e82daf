"""What ``train`` and ``resume`` share: the run with its display, its report, and the last line."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from clicktrain.commands.inspect import asked_and_reached, training_share
from clicktrain.commands.progress import make_progress
from clicktrain.commands.screen import lasting_console, warn
from clicktrain.methods import Method
from clicktrain.methods.outcome import Outcome
from clicktrain.train import RunConfig, RunFolder, TrainingInterrupted
from clicktrain.train.fit import fit
from clicktrain.wording import clock


def carry_out(
    config: RunConfig,
    method: Method[Any],
    folder: RunFolder,
    *,
    quiet: bool,
    report: bool,
    notes: Sequence[str] = (),
    resume: bool = False,
) -> int:
    """Train (or go on training), write the report, print what was reached; the exit code.

    Args:
        config: settings of the run.
        method: settings of the method.
        folder: of the run.
        quiet: no progress.
        report: write report.html.
        notes: sentences to print before the run starts.
        resume: continue the run in the folder.
    """
    console = lasting_console(f"the run goes on without it, in {folder.path}")
    progress = make_progress(console, quiet)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    try:
        with nullcontext() if quiet else log_lines(console):
            summary = fit(config, method, folder, progress=progress, resume=resume)
    except TrainingInterrupted as stop:
        if progress is not None:
            progress.close()
        warn(str(stop))
        return stop.exit_code
    finally:
        if progress is not None:
            progress.close()
    try:
        if report:
            from clicktrain.report import write_report

            write_report([folder.path], folder.path / "report.html")
    finally:  # whatever happens to the report: the run itself is done
        for line in outcome_lines(summary, quiet):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print(result_line(summary, folder.path), markup=False, highlight=False, soft_wrap=True)
    return 0


@contextmanager
def log_lines(console: Console) -> Iterator[None]:
    """Print what the package logs inside the block, that data is being decoded for instance."""
    logger = logging.getLogger("clicktrain")
    handler = _ConsoleHandler(console)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)


def outcome_lines(summary: Mapping[str, Any], quiet: bool) -> list[str]:
    """The table of what was asked and reached, and a warning for what was missed; ``quiet``: the warnings."""
    outcome = Outcome.from_json(summary.get("outcome") or ())
    lines = str(outcome).splitlines() if outcome.targets and not quiet else []
    return [*lines, *(f"warning: {sentence}" for sentence in summary.get("warnings") or ())]


def result_line(summary: Mapping[str, Any], path: Path) -> str:
    """What was reached beside what was asked, what it saved, and where the files are."""
    parts = [asked_and_reached(summary)]
    if (accuracy := summary.get("val_accuracy")) is not None:
        parts.append(f"accuracy {accuracy:.2f}% (best {summary['best_val_accuracy']:.2f}%)")
    parts.append(training_share(summary, 0))
    parts.append(f"inference FLOPs {100 * summary['inference_flops_ratio']:.0f}% of dense")
    parts.append(f"time {clock(summary['train_seconds'])}")
    return "; ".join(parts) + f"; files in {path}"
