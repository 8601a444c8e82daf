"""Write to a standard output that may close early: `| head`, a closed terminal, a full disk."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn, TextIO, cast

from rich.console import Console


class Screen(io.TextIOBase):
    """A text stream that outlives its reader.

    A run lasts longer than a pipe: when the stream fails, ``lost`` is called once with the reason, and what
    is written from then on goes nowhere.
    """

    def __init__(self, stream: TextIO | None, lost: Callable[[str], None]) -> None:
        super().__init__()
        self._stream = stream
        self._lost = lost

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's encoding, or utf-8."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def writable(self) -> bool:
        """Always true: text that nobody reads is dropped."""
        return True

    def isatty(self) -> bool:
        """Whether a person sees it."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """The stream's descriptor; OSError if it is closed."""
        if self._stream is None:
            raise OSError("the output is closed")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write, or drop."""
        self._try(lambda stream: stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if it is open."""
        self._try(lambda stream: stream.flush())

    def _try(self, act: Callable[[TextIO], object]) -> None:
        stream = self._stream
        if stream is not None:
            try:
                act(stream)
            except (OSError, ValueError) as error:  # ValueError: closed
                self._stream = None
                if stream is sys.stdout:
                    discard_stdout()
                self._lost(getattr(error, "strerror", None) or str(error))


_WIDEST = 160
"""Columns of a table that no terminal shows."""


def lasting_console(goes_on: str) -> Console:
    """Make a console for a run: if its output closes, one warning says how the run goes on."""
    screen = Screen(
        sys.stdout, lambda reason: warn(f"the output cannot be written any more ({reason}): {goes_on}")
    )
    return Console(file=cast("TextIO", screen))


class PipeConsole(Console):
    """A console that passes a broken pipe on to the command line, which ends quietly.

    Into a file or a pipe tables are as wide as they want to be, unless COLUMNS says how wide.
    """

    def __init__(self) -> None:
        super().__init__()
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = _WIDEST

    def on_broken_pipe(self) -> NoReturn:
        """Rich's own ends the process with code 1."""
        raise BrokenPipeError


def discard_stdout() -> None:
    """Redirect standard output to nowhere, so that flushing it at exit cannot fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)


def warn(sentence: str) -> None:
    """Print a sentence to standard error, if it is open."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"clicktrain: {sentence}", file=sys.stderr, flush=True)
