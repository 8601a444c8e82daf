"""Progress of a run: a live display on a terminal, one line per epoch elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from clicktrain.wording import clock

if TYPE_CHECKING:
    from clicktrain.methods import Method
    from clicktrain.train import Prepared, Progress, RunConfig, StepProgress

REFRESH_SECONDS = 0.25
"""Shortest time between two updates of the live display."""


class EpochLines:
    """Print one line per finished epoch, for log files and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._last: StepProgress | None = None

    def start(self, config: RunConfig, method: Method[Any], prepared: Prepared) -> None:
        """Print the network, method, length, device and precision."""
        batches = len(prepared.train_loader)
        self._print(
            f"{config.model}, method {config.method}: {config.epochs} epochs of {batches} batches "
            f"on {prepared.device} in {config.precision}"
        )

    def step(self, info: StepProgress) -> None:
        """Keep the position in the run, for the epoch's line."""
        self._last = info

    def epoch(self, record: dict[str, Any]) -> None:
        """Print the epoch's line."""
        left = None
        if self._last is not None and self._last.epoch == record["epoch"]:
            left = self._last.eta_seconds
        epochs = f"/{self._last.epochs}" if self._last is not None else ""
        self._print(epoch_line(record, epochs, left))

    def message(self, text: str) -> None:
        """Print a message."""
        self._print(text)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Do nothing: the command prints the result."""

    def close(self) -> None:
        """Do nothing."""

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


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
        super().step(info)
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
    """Draw a bar over the whole run, and current numbers below it."""
    done = (info.epoch - 1) * info.batches + info.batch
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    bar.add_row(
        Text(f"epoch {info.epoch}/{info.epochs} step {info.batch}/{info.batches}", style="bold"),
        ProgressBar(total=info.epochs * info.batches, completed=done),
        Text(f"ETA {clock(info.eta_seconds)}", style="cyan"),
    )
    numbers = Text.assemble(
        ("stage ", "dim"),
        (info.stage, "magenta"),
        ("  loss ", "dim"),
        f"{info.loss:.4f}",
        ("  accuracy ", "dim"),
        f"{info.accuracy:.1f}%",
        ("  sparsity ", "dim"),
        f"{100 * (1 - info.density):.1f}%",
        ("  rate ", "dim"),
        f"{info.learning_rate:.3g}",
        ("  waiting for data ", "dim"),
        f"{100 * info.data_share:.0f}%",
    )
    return Group(bar, numbers)


def epoch_line(record: Mapping[str, Any], epochs: str = "", eta_seconds: float | None = None) -> str:
    """Format a finished epoch as one line.

    Args:
        record: a line of metrics.jsonl.
        epochs: "/60", to follow the number of the epoch.
        eta_seconds: what is left of the run, or None.
    """
    seconds = record["seconds"]
    share = 100 * record["data_seconds"] / seconds if seconds else 0.0
    parts = [
        f"epoch {record['epoch']:>{max(len(epochs) - 1, 1)}}{epochs}",
        f"loss {record['train_loss']:.4f}",
        f"train {record['train_accuracy']:5.1f}%",
        "val     -" if record["val_accuracy"] is None else f"val {record['val_accuracy']:5.1f}%",
        f"sparsity {100 * record['sparsity']:4.1f}%",
        f"{seconds:.1f} s",
        f"waiting for data {share:.0f}%",
    ]
    if eta_seconds is not None:
        parts.append(f"ETA {clock(eta_seconds)}")
    parts.append("+".join(record["stages"]) or record["stage"])  # last: an epoch may hold several
    return "  ".join(parts)


if TYPE_CHECKING:
    _: type[Progress] = EpochLines
