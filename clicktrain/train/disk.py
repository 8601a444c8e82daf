"""Whether a run's files will fit, asked before it starts."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

from clicktrain.errors import UserError
from clicktrain.train.config import RunConfig

_SPARE_BYTES = 20 * 2**20
"""Logs, summary and report."""
_CHANNEL_BYTES = 9
"""Of a number of three digits, as text."""


def bytes_needed(model: nn.Module, config: RunConfig) -> int:
    """Upper estimate of what the folder of a run takes, in bytes.

    A checkpoint holds the weights, one (sgd) or two (adam, adamw) moments, the moving average and the
    importance that a method collects; one more than ``keep_checkpoints`` is on disk while the newest is
    written. Two numbers per channel and epoch are in channels.jsonl, if a method pushes channels to zero.
    """
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    moments = 1 if config.optimizer == "sgd" else 2
    per_checkpoint = weights * (1 + moments + (1 if config.ema_decay else 0) + 2)
    channels = sum(p.shape[0] + p.shape[1] for p in model.parameters() if p.dim() == 4)
    logs = channels * config.epochs * _CHANNEL_BYTES + _SPARE_BYTES
    return per_checkpoint * (config.keep_checkpoints + 1) + 2 * weights + logs


def check_disk(path: Path, needed: int, free: int | None = None) -> None:
    """Raise UserError if the disk of ``path`` (which need not exist) has less than ``needed`` bytes free."""
    if free is None:
        there = path.absolute()
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"the run needs about {needed / 2**20:,.0f} MB at {path} and {free / 2**20:,.0f} MB are free: "
            "free some space, lower keep_checkpoints, or give another --out"
        )
