"""Failures of a compiler, a disk or a library: one exception, and a list for callers that go on without."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from clicktrain.errors import UserError


class KernelError(UserError, RuntimeError):
    """A generated kernel cannot be built or loaded here: one sentence, with the cause and what would help.

    ``output`` is everything that the compiler printed, for who debugs a kernel.
    """

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


class _Listeners(threading.local):
    def __init__(self) -> None:
        self.lists: list[list[KernelError]] = []


_LISTENERS = _Listeners()


@contextlib.contextmanager
def watch_failures() -> Iterator[list[KernelError]]:
    """Collect the failures that this thread's code works around inside the block, in order."""
    failures: list[KernelError] = []
    _LISTENERS.lists.append(failures)
    try:
        yield failures
    finally:
        _LISTENERS.lists.pop()


def report_failure(error: KernelError) -> None:
    """Tell whoever watches about a failure that the caller goes on without."""
    for failures in _LISTENERS.lists:
        failures.append(error)


def summary(failures: list[KernelError]) -> str:
    """One clause about several failures: how many kernels, and the first cause."""
    count = len(failures)
    kernels = "a generated kernel" if count == 1 else f"{count} generated kernels"
    return f"{kernels} cannot be used here: {failures[0]}"
