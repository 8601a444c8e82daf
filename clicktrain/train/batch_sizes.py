"""The batch sizes of a run, and the place of an optimizer step in it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BatchSize:
    """Epochs with batches of one size.

    Attributes:
        images: in a batch.
        batches: in an epoch.
        steps: of the optimizer in an epoch.
        learning_rate_factor: on the scheduled learning rate.
        epoch: from which epoch on, counted from 0.
        batches_before: of the run, before that epoch.
        steps_before: of the optimizer, before that epoch.
    """

    images: int
    batches: int
    steps: int
    learning_rate_factor: float = 1.0
    epoch: int = 0
    batches_before: int = 0
    steps_before: int = 0


class BatchSizes:
    """All batch sizes of a run so far; one entry unless the batch was resized."""

    def __init__(self, images: int, batches: int, accumulate: int) -> None:
        """Start a run with ``batches`` batches of ``images`` images an epoch."""
        self._accumulate = accumulate
        self._entries = [BatchSize(images, batches, math.ceil(batches / accumulate))]

    @property
    def first(self) -> BatchSize:
        """The size at the start of the run."""
        return self._entries[0]

    @property
    def now(self) -> BatchSize:
        """The size in the running epoch."""
        return self._entries[-1]

    def resize(self, epoch: int, images: int, batches: int, learning_rate_factor: float) -> None:
        """Set another size from epoch ``epoch`` (from 0) on, which has not begun."""
        last, passed = self.now, epoch - self.now.epoch
        if passed < 1:
            raise ValueError(f"epoch {epoch} has its batch size already")
        self._entries.append(
            BatchSize(
                images,
                batches,
                math.ceil(batches / self._accumulate),
                learning_rate_factor,
                epoch,
                last.batches_before + passed * last.batches,
                last.steps_before + passed * last.steps,
            )
        )

    def batch_number(self, epoch: int, batch: int) -> int:
        """Number in the run of a batch of the running epoch, both counted from 0."""
        return self.now.batches_before + (epoch - self.now.epoch) * self.now.batches + batch

    def schedule_step(self, step: int) -> float:
        """The step at which a run of the first batch size would be in the same place.

        In such a run it is ``step`` itself, exactly.
        """
        entry = self._at(step)
        return entry.epoch * self.first.steps + (step - entry.steps_before) * (self.first.steps / entry.steps)

    def learning_rate_factor(self, step: int) -> float:
        """The factor on the scheduled learning rate at an optimizer step."""
        return self._at(step).learning_rate_factor

    def _at(self, step: int) -> BatchSize:
        return next(entry for entry in reversed(self._entries) if step >= entry.steps_before)

    def state_dict(self) -> list[dict[str, Any]]:
        """As plain numbers."""
        return [dataclasses.asdict(entry) for entry in self._entries]

    def load_state(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Inverse of `state_dict`."""
        self._entries = [BatchSize(**entry) for entry in saved]
