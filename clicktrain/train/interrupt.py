"""Signals that ask a run to stop: it finishes the current step and writes a checkpoint first."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

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

    Attributes:
        signum: the signal that came, or None.
        at_once: raise `StoppedAtOnce` instead: there is no state that a checkpoint would save.
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
