"""Why a run stops early: a loss that diverges, a network that collapses, a signal."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.errors import NetworkCollapsed, OutOfMemory, UserError, shortened
from clicktrain.train.config import RunConfig

EXPLOSION = 1e4
"""A loss this many times that of the first epoch stops a run."""


class TrainingDiverged(UserError):  # noqa: N818 - reads as a sentence to the user
    """The loss is no longer a number or has exploded; the last good checkpoint is left."""


def diverged(what: str, epoch: int, batch: int, checkpoint: Path | None) -> TrainingDiverged:
    """The error, as one sentence: what ("the loss is nan"), where (counted from 1), what is left to try."""
    left = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written yet"
    return TrainingDiverged(
        f"training diverged: {what} in epoch {epoch} after batch {batch}; {left}; "
        "try a lower learning_rate, a longer warmup_epochs, clip_grad_norm=1, or precision=fp32"
    )


def collapsed(what: str, checkpoint: Path | None) -> NetworkCollapsed:
    """The error, as one sentence, with the checkpoint that is left."""
    left = f"the last checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written yet"
    return NetworkCollapsed(f"{what}; {left}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left: Python's, PyTorch's on CPUs or on GPUs."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def out_of_memory(config: RunConfig, error: BaseException) -> OutOfMemory:
    """The error as one sentence, with what was asked for."""
    reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
    return OutOfMemory(
        f"there is no memory left for batches of {config.batch_size} images: lower batch_size or width, or "
        f"share the batch among more processes ({shortened(reason, 160)})"
    )


class LossWatch:
    """Collects losses on the device and reads several at once, to synchronize with a GPU rarely."""

    def __init__(self, every: int, report: Callable[[list[float], list[int]], None]) -> None:
        """``report`` gets the losses and correct predictions of up to ``every`` batches at once."""
        self._every = every
        self._report = report
        self._pending: list[Tensor] = []

    def add(self, loss: Tensor, correct: Tensor) -> bool:
        """Add a batch's loss and number of correct predictions, 0-dim tensors; True if they were read."""
        self._pending.append(torch.stack((loss.detach().float(), correct.float())))
        if due := len(self._pending) >= self._every:
            self.flush()
        return due

    def flush(self) -> None:
        """Read what is pending."""
        if self._pending:
            rows = torch.stack(self._pending).tolist()
            self._pending = []
            self._report([row[0] for row in rows], [round(row[1]) for row in rows])


def explosion(loss: float, reference: float | None) -> str | None:
    """What is wrong with a loss, in words, or None; ``reference`` is the first epoch's loss, if known."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if reference is not None and loss > EXPLOSION * max(reference, 1e-3):
        return f"the loss is {loss:.3g}, that of the first epoch was {reference:.3g}"
    return None


def weights_are_finite(model: nn.Module) -> bool:
    """Whether all parameters and buffers of the model are finite."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    return not tensors or bool(torch.stack([t.detach().isfinite().all() for t in tensors]).all())


SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a run to stop; one that is ignored (``nohup``, background jobs) stays ignored."""
ECHO_SECONDS = 1.0
"""Signals within this time after the first one count as the same: a closing terminal sends several."""


class TrainingInterrupted(Exception):  # noqa: N818 - not an error: the run was asked to stop
    """A signal stopped the run: before anything was written, or after a checkpoint was.

    Attributes:
        exit_code: 128 + the signal's number: 143 for SIGTERM, 130 for SIGINT, 129 for SIGHUP.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum


class StoppedAtOnce(BaseException):
    """A signal came before training; passes through whatever catches exceptions."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


class StopRequest:
    """While active, the first signal only sets ``signum``; a later one acts as usual.

    ``at_once``: raise `StoppedAtOnce` instead, where there is no state that a checkpoint would save.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.at_once = False
        self._came = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for signum in SIGNALS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *unused: object) -> None:
        self._restore()

    @property
    def requested(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return self.signum is not None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.at_once:
            self._restore()
            raise StoppedAtOnce(signum)
        if self.signum is None:
            self.signum, self._came = signum, time.monotonic()
        elif time.monotonic() - self._came >= ECHO_SECONDS:
            self._restore()
            signal.raise_signal(signum)

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
