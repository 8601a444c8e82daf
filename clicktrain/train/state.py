"""The state of a run as plain numbers: what a checkpoint holds besides tensors."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clicktrain.comm import Exchange
from clicktrain.runs.logs import LogMark
from clicktrain.train.initial_weights import EarlierCost

RECENT = 20
"""Readings of the time per batch that the present pace is taken from."""


@dataclass
class EpochTotals:
    """Sums over the batches of the running epoch.

    ``seconds`` is wall clock without evaluation and checkpoints, ``data_seconds`` the part of it spent
    waiting for data, ``stages`` the number of batches per stage, ``window_ms`` milliseconds per batch, one
    value per reading of the losses, ``exchange`` what this process has handed to collectives, by purpose, in
    ``exchange_steps`` optimizer steps.
    """

    loss_sum: float = 0.0
    correct: int = 0
    images: int = 0
    batches: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    learning_rate: float = 0.0
    stages: dict[str, int] = field(default_factory=dict)
    window_ms: list[float] = field(default_factory=list)
    exchange: Exchange = field(default_factory=dict)
    exchange_steps: int = 0

    @property
    def loss(self) -> float:
        """Mean loss per batch."""
        return self.loss_sum / max(self.batches, 1)

    @property
    def accuracy(self) -> float:
        """Percent of the images that were classified correctly."""
        return 100 * self.correct / max(self.images, 1)

    @property
    def step_ms_median(self) -> float:
        """Median milliseconds per batch, waiting for data included."""
        return statistics.median(self.window_ms) if self.window_ms else 0.0

    @property
    def recent_ms(self) -> float | None:
        """Median milliseconds of the last batches, which follows a change of the network; None before any."""
        return statistics.median(self.window_ms[-RECENT:]) if self.window_ms else None

    @property
    def stage_shares(self) -> dict[str, float]:
        """Share of the epoch's batches in each stage."""
        return {stage: number / max(self.batches, 1) for stage, number in self.stages.items()}


@dataclass
class TrainState:
    """How far a run has come.

    ``epoch`` counts finished epochs, ``batch`` batches done in the running one, ``step`` optimizer steps.
    FLOPs and seconds are of the whole run so far, ``earlier`` is what its initial weights have cost.
    ``train_flops`` are those executed, ``train_flops_nominal`` as `TrainingCost.nominal` counts; None in a
    run that an earlier version has begun.
    ``seconds_asked`` is what a time budget came to, ``seconds_planned`` what the chosen epochs were to take.
    ``best_val_accuracy`` is of the network as it is now, not of what it was before a removal.
    ``iteration`` is what an iteration of the running epoch takes (`account_iteration`),
    ``memory_calibration`` measured / estimated memory, ``memory_budget`` the bytes that a growing batch may
    take. Since the last removal of channels, ``batch_outdated``: the batch has not been resized;
    ``memory_unmeasured``: no iteration was measured; ``channels_renumbered``: channels.jsonl has no line.
    ``exchange`` and ``exchange_steps`` are sums of the finished epochs'.
    ``logs`` is what metrics.jsonl, events.jsonl and channels.jsonl were when a checkpoint was written.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    train_flops: int = 0
    train_flops_dense: int = 0
    train_flops_nominal: int | None = 0
    earlier: EarlierCost = field(default_factory=EarlierCost)
    seconds: float = 0.0
    seconds_asked: float | None = None
    seconds_planned: float | None = None
    epoch_seconds: float = 0.0
    data_seconds: float = 0.0
    first_loss: float | None = None
    val_accuracy: float | None = None
    best_val_accuracy: float | None = None
    iteration: dict[str, Any] = field(default_factory=dict)
    memory_calibration: float = 1.0
    memory_budget: int | None = None
    batch_outdated: bool = False
    memory_unmeasured: bool = True
    channels_renumbered: bool = True
    operators_recorded: bool = False
    exchange: Exchange = field(default_factory=dict)
    exchange_steps: int = 0
    logs: dict[str, LogMark] = field(default_factory=dict)
    totals: EpochTotals = field(default_factory=EpochTotals)

    def add_nominal(self, flops: int) -> None:
        """Add to the nominal training FLOPs, if they are known."""
        if self.train_flops_nominal is not None:
            self.train_flops_nominal += flops

    def note_removal(self) -> None:
        """Channels were removed."""
        self.best_val_accuracy = None
        self.batch_outdated = self.memory_unmeasured = self.channels_renumbered = True

    def state_dict(self) -> dict[str, Any]:
        """As nested dicts of numbers."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> TrainState:
        """Inverse of `state_dict`."""
        parts = {
            "totals": EpochTotals(**saved["totals"]),
            "earlier": EarlierCost.from_state(saved["earlier"]),
            "logs": {name: LogMark(**mark) for name, mark in saved["logs"].items()},
        }
        return cls(**{"train_flops_nominal": None, **saved, **parts})
