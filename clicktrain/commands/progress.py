"""A run on the command line: its display, its report, and the last line."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from clicktrain.comm.processes import TIMEOUT_S, launched
from clicktrain.commands.inspect import asked_and_reached, training_share
from clicktrain.commands.screen import lasting_console, warn
from clicktrain.methods import Method
from clicktrain.methods.outcome import Outcome
from clicktrain.runs.summary import file_rows
from clicktrain.train import RunConfig, RunFolder, TrainingInterrupted
from clicktrain.train.fit import Resume, fit
from clicktrain.wording import clock, table_lines

if TYPE_CHECKING:
    from clicktrain.methods import Method
    from clicktrain.train import Prepared, Progress, RunConfig, StepProgress

REFRESH_SECONDS = 0.25
"""Shortest time between two updates of the live display."""
LINE_SECONDS = 60.0
"""In a log file, a line comes at least that often."""


class EpochLines:
    """Print one line per finished epoch, for log files and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last: StepProgress | None = None
        self._said = time.monotonic()

    def start(self, config: RunConfig, method: Method[Any], prepared: Prepared) -> None:
        """Print the network, method, length, device and precision."""
        batches, number = len(prepared.train_loader), prepared.processes.number
        several = f", in {number} processes" if number > 1 else ""
        self.message(
            f"{config.model}, method {config.method}: {config.epochs} epochs of {batches} batches "
            f"on {prepared.device} in {config.precision}{several}"
        )
        if not prepared.pruner.frozen and (warning := prepared.pruner.plan().warning) is not None:
            self.message(f"warning: {warning}")

    def step(self, info: StepProgress) -> None:
        """Keep the position in the run, for the epoch's line; inside a long epoch, a line now and then."""
        self._last = info
        if info.batch < info.batches and time.monotonic() - self._said >= LINE_SECONDS:
            self.message(step_line(info))

    def epoch(self, record: dict[str, Any]) -> None:
        """Print the epoch's line."""
        last = self._last
        left = last.eta_seconds if last is not None and last.epoch == record["epoch"] else None
        epochs = f"/{last.epochs}" if last is not None else ""
        self.message(epoch_line(record, epochs, left))

    def message(self, text: str) -> None:
        """Print a message."""
        self._said = time.monotonic()
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Do nothing: the command prints the result."""

    def close(self) -> None:
        """Do nothing."""


class LiveDisplay(EpochLines):
    """Draw a bar and current numbers at the bottom of the terminal, epoch lines above."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        # Refreshed from `step`, not by a thread of rich's: data workers are forked from this process.
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._shown = 0.0

    def start(self, config: RunConfig, method: Method[Any], prepared: Prepared) -> None:
        """Begin to draw."""
        super().start(config, method, prepared)
        self._live.start()

    def step(self, info: StepProgress) -> None:
        """Redraw, unless that was done a moment ago."""
        self._last = info
        now = time.monotonic()
        if now - self._shown >= REFRESH_SECONDS or info.batch == info.batches:
            self._shown = now
            self._live.update(picture(info), refresh=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Stop drawing."""
        self.close()

    def close(self) -> None:
        """Release the terminal; may be called twice."""
        self._live.stop()


def make_progress(console: Console, quiet: bool) -> EpochLines | None:
    """Make the display for a console: live on a terminal, lines elsewhere, None if ``quiet``."""
    if quiet:
        return None
    return LiveDisplay(console) if console.is_terminal else EpochLines(console)


def picture(info: StepProgress) -> Group:
    """Draw a bar over the whole run, one over the epoch, and current numbers below them."""
    done = (info.epoch - 1) * info.batches + info.batch
    bars = Table.grid(padding=(0, 1), expand=True)
    bars.add_column(no_wrap=True)
    bars.add_column(ratio=1)
    bars.add_column(no_wrap=True, justify="right")
    bars.add_column(no_wrap=True, justify="right")
    bars.add_row(
        Text(f"epoch {info.epoch}/{info.epochs}", style="bold"),
        ProgressBar(total=info.epochs * info.batches, completed=done),
        Text(f"{100 * done / (info.epochs * info.batches):.0f}%"),
        Text(f"ETA {clock(info.eta_seconds)}", style="cyan"),
    )
    bars.add_row(
        Text(f"step {info.batch}/{info.batches}"),
        ProgressBar(total=info.batches, completed=info.batch),
        Text(pace(info)),
        Text(f"ETA {clock(info.epoch_eta_seconds)}", style="dim"),
    )
    numbers = {
        "loss": f"{info.loss:.4f}",
        "accuracy": f"{info.accuracy:.1f}%",
        "sparsity": f"{100 * (1 - info.density):.1f}%",
        "rate": f"{info.learning_rate:.3g}",
        "waiting for data": f"{100 * info.data_share:.0f}%",
    }
    line = Text.assemble(("stage ", "dim"), (info.stage, "magenta"))
    for name, number in numbers.items():
        line.append(f"  {name} ", "dim").append(number)
    return Group(bars, line)


def pace(info: StepProgress) -> str:
    """Images per second, in three digits at least."""
    value = info.images_per_second
    return f"{value:,.0f} images/s" if value >= 100 else f"{value:.3g} images/s"


def step_line(info: StepProgress) -> str:
    """A line inside an epoch, where no bar can be drawn."""
    parts = [
        f"epoch {info.epoch:>{len(str(info.epochs)) + 1}}/{info.epochs}",
        f"step {info.batch}/{info.batches}",
        f"loss {info.loss:.4f}",
        f"train {info.accuracy:5.1f}%",
        pace(info),
        f"ETA {clock(info.epoch_eta_seconds)} of the epoch, {clock(info.eta_seconds)} of the run",
        info.stage,
    ]
    return "  ".join(parts)


def epoch_line(record: Mapping[str, Any], epochs: str = "", eta_seconds: float | None = None) -> str:
    """Format a line of metrics.jsonl; ``epochs``, as "/60", follows the number of the epoch."""
    seconds, ms = record["seconds"], record.get("step_ms_median")
    share = 100 * record["data_seconds"] / seconds if seconds else 0.0
    parts = [
        f"epoch {record['epoch']:>{max(len(epochs) - 1, 1)}}{epochs}",
        f"loss {record['train_loss']:.4f}",
        f"train {record['train_accuracy']:5.1f}%",
        "val     -" if record["val_accuracy"] is None else f"val {record['val_accuracy']:5.1f}%",
        f"sparsity {100 * record['sparsity']:4.1f}%",
        f"{seconds:.1f} s",
        *([f"{1000 * record['batch_size'] / ms:,.0f} images/s"] if ms else []),
        f"waiting for data {share:.0f}%",
    ]
    if eta_seconds is not None:
        parts.append(f"ETA {clock(eta_seconds)}")
    parts.append("+".join(record["stages"]) or record["stage"])  # last: an epoch may hold several
    return "  ".join(parts)


if TYPE_CHECKING:
    _: type[Progress] = EpochLines


def carry_out(
    config: RunConfig,
    method: Method[Any],
    folder: RunFolder,
    *,
    quiet: bool,
    report: bool,
    notes: Sequence[str] = (),
    resume: Resume = False,
    process_timeout: float = TIMEOUT_S,
) -> int:
    """Train (or go on training), write the report, print what was reached; the exit code.

    ``notes`` are sentences to print before the run starts.
    """
    if not launched().first:
        return _follow(config, method, folder, resume, process_timeout)
    console = lasting_console(f"the run goes on without it, in {folder.path}")
    progress = make_progress(console, quiet)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    try:
        with nullcontext() if quiet else log_lines(console):
            summary = fit(
                config, method, folder, progress=progress, resume=resume, process_timeout=process_timeout
            )
    except TrainingInterrupted as stop:
        if progress is not None:
            progress.close()  # before the sentence is printed
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


def _follow(
    config: RunConfig, method: Method[Any], folder: RunFolder, resume: Resume, process_timeout: float
) -> int:
    """Train as one of several processes, of which the first one speaks; the exit code."""
    try:
        fit(config, method, folder, resume=resume, process_timeout=process_timeout)
    except TrainingInterrupted as stop:
        return stop.exit_code
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
    """Tables of what was asked and reached and of the files, and what was missed; ``quiet``: that alone."""
    outcome = Outcome.from_json(summary.get("outcome") or ())
    lines = str(outcome).splitlines() if outcome.targets and not quiet else []
    if not quiet and (files := file_rows(summary)):
        lines += table_lines(files)
    return [*lines, *(f"warning: {sentence}" for sentence in summary.get("warnings") or ())]


def _with_initial(summary: Mapping[str, Any]) -> str:
    """What the weights that a run started from add to its time, if that is known."""
    if not summary.get("initial_train_seconds"):
        return ""
    return f", {clock(summary['total_train_seconds'])} with its initial weights"


def result_line(summary: Mapping[str, Any], path: Path) -> str:
    """What was reached beside what was asked, what it saved, and where the files are."""
    parts = [asked_and_reached(summary)]
    if (accuracy := summary.get("val_accuracy")) is not None:
        parts.append(f"accuracy {accuracy:.2f}% (best {summary['best_val_accuracy']:.2f}%)")
    if (views := summary.get("test_time_augmentation")) is not None:
        parts[-1] += f" with test-time augmentation ({views})"
    if (tested := summary.get("test_accuracy")) is not None:
        parts.append(f"on the test images {tested:.2f}%")
    parts.append(training_share(summary, 0))
    parts.append(f"inference FLOPs {100 * summary['inference_flops_ratio']:.0f}% of dense")
    parts.append(f"time {clock(summary['train_seconds'])}{_with_initial(summary)}")
    return "; ".join(parts) + f"; files in {path}"
