"""One kernel: from its source to a library that another process has loaded, or why there is none."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

from clicktrain.errors import UserError
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.kernels.native.c_compiler import Toolchain, first_error
from clicktrain.kernels.native.command import Finished, compile_seconds, run_limited
from clicktrain.kernels.native.failure import KernelError
from clicktrain.kernels.native.folder import is_full, unwritable
from clicktrain.kernels.native.trial import why_unfit, with_identity

_OTHER = "name another compiler in CC"


def compile_kernel(source: str, key: str, tools: Toolchain, work: Path) -> Path:
    """Compile a source, and load the library in another process; ``work`` is removed afterwards.

    Raises:
        KernelError: the compiler refuses the source, hangs, is killed, finds no space, makes a library that
            cannot be loaded; or it has failed for so long that it is not tried again.
    """
    _PATIENCE.check()
    start = time.monotonic()
    try:
        product = _compile(source, key, tools, work)
    except KernelError as error:
        _PATIENCE.failed(error, time.monotonic() - start)
        raise
    _PATIENCE.succeeded()
    return product


def _compile(source: str, key: str, tools: Toolchain, work: Path) -> Path:
    text, product = work / "kernel.c", work / "kernel.so"
    try:
        text.write_text(with_identity(source, key), encoding="utf-8")
    except OSError as error:
        raise unwritable(work.parent, error) from error
    done = run_limited(tools.command(text, product), compile_seconds(), work)
    if done.problem and not done.hung and is_full(work, done.output):
        raise unwritable(work.parent)
    if done.problem:
        message = _failure(done, tools.name, work)
    else:
        why = why_unfit(product, key, work) if product.is_file() else "writes no library"
        if not why:
            return product
        message = f"for a generated kernel, {tools.name} {why}: {_OTHER}"
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

    def check(self) -> None:
        if self._wasted >= compile_seconds():
            raise KernelError(self._last)

    def failed(self, error: KernelError, seconds: float) -> None:
        with self._lock:
            self._wasted += seconds
            self._last = str(error)

    def succeeded(self) -> None:
        with self._lock:
            self._wasted = 0.0


_PATIENCE = _Patience()
