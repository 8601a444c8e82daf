"""SIGTERM and SIGINT: the current step is finished and a checkpoint written before the process ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class TrainingInterrupted(Exception):  # noqa: N818 - not an error: the run was asked to stop
    """A signal stopped the run after a checkpoint was written.

    Attributes:
        exit_code: 128 + the signal's number: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum


class StopRequest:
    """While active, the first SIGTERM or SIGINT only sets ``signum``; a second one acts as usual."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *unused: object) -> None:
        self._restore()

    @property
    def requested(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return self.signum is not None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            self._restore()
            signal.raise_signal(signum)
        self.signum = signum

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}
