"""Reads the losses of an epoch from the device, and the errors of runs that diverge or collapse."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from clicktrain.errors import NetworkCollapsed, UserError

EXPLOSION = 1e4
"""A loss this many times that of the first epoch stops a run."""


class TrainingDiverged(UserError):  # noqa: N818 - reads as a sentence to the user
    """The loss is no longer a number or has exploded; the last good checkpoint is left."""


def diverged(what: str, epoch: int, batch: int, checkpoint: Path | None) -> TrainingDiverged:
    """The error, as one sentence: what, where, what is left and what to try.

    Args:
        what: the finding, as in "the loss is nan".
        epoch: counted from 1.
        batch: in the epoch, counted from 1.
        checkpoint: newest checkpoint, or None.
    """
    left = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written yet"
    return TrainingDiverged(
        f"training diverged: {what} in epoch {epoch} after batch {batch}; {left}; "
        "try a lower learning_rate, a longer warmup_epochs, clip_grad_norm=1, or precision=fp32"
    )


def collapsed(what: str, checkpoint: Path | None) -> NetworkCollapsed:
    """The error, as one sentence, with the checkpoint that is left."""
    left = f"the last checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written yet"
    return NetworkCollapsed(f"{what}; {left}")


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
        if len(self._pending) >= self._every:
            self.flush()
            return True
        return False

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
