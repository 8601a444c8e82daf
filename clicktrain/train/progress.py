"""What a run tells while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from clicktrain.methods import Method
    from clicktrain.train.config import RunConfig
    from clicktrain.train.prepare import Prepared


@dataclass(frozen=True, slots=True)
class StepProgress:
    """Where a run is, told every few batches (every batch on a CPU).

    Attributes:
        epoch: the running epoch, counted from 1, of ``epochs``.
        batch: batches done in it, of ``batches``.
        step: optimizer steps done in the run.
        stage: stage of the method.
        loss: mean training loss of the epoch so far.
        accuracy: mean training accuracy of the epoch so far, in percent.
        density: living convolution weights / all convolution weights.
        learning_rate: of the last step.
        seconds: wall clock of the whole run so far, interruptions left out.
        eta_seconds: what is left at the pace of this process, or None while it has no pace yet.
        data_share: share of the epoch's time spent waiting for data.
    """

    epoch: int
    epochs: int
    batch: int
    batches: int
    step: int
    stage: str
    loss: float
    accuracy: float
    density: float
    learning_rate: float
    seconds: float
    eta_seconds: float | None
    data_share: float


class Progress(Protocol):
    """A listener; the calls come in this order, from the training thread."""

    def start(self, config: RunConfig, method: Method[Any], prepared: Prepared) -> None:
        """Everything is checked and loaded, training begins (or goes on)."""

    def step(self, info: StepProgress) -> None:
        """Some batches were trained on."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is finished; the record is its line in metrics.jsonl."""

    def message(self, text: str) -> None:
        """Something that a person should know."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is finished and its files are written."""


class Silent:
    """Tells nothing."""

    def start(self, config: RunConfig, method: Method[Any], prepared: Prepared) -> None:
        """Nothing."""

    def step(self, info: StepProgress) -> None:
        """Nothing."""

    def epoch(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Nothing."""
