"""Listeners to a run in progress."""

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
    """Where a run is; reported every few batches (every batch on a CPU).

    The running ``epoch`` counts from 1, ``batch`` the batches done in it, ``step`` the optimizer steps of the
    run. Loss and accuracy (percent) are means over the epoch so far, ``density`` is that of the convolution
    weights, ``seconds`` the wall clock without interruptions, ``eta_seconds`` the time left at the pace of
    this process (None before its first batch), ``data_share`` the share of the epoch spent waiting for data,
    ``images_per_second`` the pace of the last batches, of all processes, and ``epoch_eta_seconds`` what is
    left of the epoch at that pace, without evaluation; 0 and None before anything was timed.
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
    images_per_second: float = 0.0
    epoch_eta_seconds: float | None = None


class Progress(Protocol):
    """A listener; the calls come in this order, from the training thread."""

    def start(self, config: RunConfig, method: Method[Any], prepared: Prepared) -> None:
        """Training begins, or resumes."""

    def step(self, info: StepProgress) -> None:
        """Some batches were trained on."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is finished; the record is its line in metrics.jsonl."""

    def message(self, text: str) -> None:
        """A message for the user."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is finished and its files are written."""


class Silent:
    """A listener that does nothing."""

    def _ignore(self, *args: Any, **kwargs: Any) -> None:
        pass

    start = step = epoch = message = finish = _ignore
