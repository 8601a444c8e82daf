"""One kernel: from its source to a library that another process has loaded, or why there is none."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from clicktrain.errors import UserError
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.kernels.native.c_compiler import Toolchain, first_error
from clicktrain.kernels.native.command import Finished, compile_seconds, with_identity
from clicktrain.kernels.native.failure import KernelError

_OTHER = "name another compiler in CC"


def compile_kernel(source: str, key: str, tools: Toolchain, work: Path) -> Path:
    """Compile a source, and load the library in another process; ``work`` is removed afterwards.

    Raises:
        KernelError: the compiler refuses the source, hangs, is killed, finds no space, makes a library that
            cannot be loaded; or it has failed for so long that it is not tried again.
    """
    with _PATIENCE.counting():
        product, done, why = tools.build(source, key, work)
        if not done.problem and not why:
            return product
        message = f"for a generated kernel, {tools.name} {why}: {_OTHER}"
        if done.problem:
            message = _failure(done, tools.name, work)
        kept = keep_source(work.parent, source, key)
        raise KernelError(f"{message}; its source is {kept}" if kept else message, done.output)


def keep_source(folder: Path, source: str, key: str) -> Path | None:
    """Write a kernel's source beside the libraries, as ``KEY.c``; None where that is refused."""
    path = folder / f"{key}.c"
    with contextlib.suppress(OSError, UserError):  # a full disk is either
        if not path.is_file():
            write_text_atomic(path, with_identity(source, key))
        return path
    return None


def _failure(done: Finished, name: str, work: Path) -> str:
    if done.hung:
        return (
            f"{name} {done.problem} on a generated kernel: set CLICKTRAIN_COMPILE_SECONDS to more seconds, "
            f"or {_OTHER}"
        )
    if done.code is None or done.code < 0:
        return (
            f"{name} {done.problem} while compiling a generated kernel: try again with more free memory, or "
            f"{_OTHER}"
        )
    said = first_error(done.output).replace(f"{work}/", "") or done.problem
    return f"{name} refused a generated kernel ({said}): {_OTHER}"


class _Patience:
    """How long compilations have failed in a row: at the time limit of one, no more are tried.

    A compiler that hangs on everything would else cost its time limit for every kernel of a network.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wasted = 0.0
        self._last = ""

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        if self._wasted >= compile_seconds():
            raise KernelError(self._last)
        start = time.monotonic()
        try:
            yield
        except KernelError as error:
            with self._lock:
                self._wasted += time.monotonic() - start
                self._last = str(error)
            raise
        with self._lock:
            self._wasted = 0.0


_PATIENCE = _Patience()
