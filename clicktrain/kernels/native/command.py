"""Running a compiler that may hang or be killed, and loading its library in another process first."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clicktrain.errors import UserError
from clicktrain.kernels.native.source import read_static

SECONDS = 120.0
"""Time limit of one compilation, unless ``CLICKTRAIN_COMPILE_SECONDS`` says otherwise."""
_MOST_OUTPUT = 16 << 20
"""Bytes after which a program is taken for one that prints without end."""
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command ended: its output, standard output and error together.

    ``problem`` is what went wrong, to be put behind the program's name, empty if it ended with code 0;
    ``hung`` whether it had to be stopped; ``code`` is None if it never started or was stopped.
    """

    output: str
    problem: str = ""
    hung: bool = False
    code: int | None = None


def compile_seconds() -> float:
    """Time limit of one compilation; a UserError if ``CLICKTRAIN_COMPILE_SECONDS`` is no number above 0."""
    text = os.environ.get("CLICKTRAIN_COMPILE_SECONDS", "").strip()
    if not text:
        return SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise UserError(f"CLICKTRAIN_COMPILE_SECONDS is {text!r}: set it to a number of seconds above 0")
    return seconds


def run_limited(command: Sequence[str], seconds: float, folder: Path, *, inside: bool = False) -> Finished:
    """Run a command, and stop it with everything it started once its time is up.

    Its standard input is empty. It keeps temporary files in ``folder``; ``inside`` works there, too.
    """
    environment = {**os.environ, "TMPDIR": str(folder), "LC_ALL": "C"}
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder if inside else None,
            start_new_session=True,  # so that what it starts can be stopped with it
        )
    except (OSError, ValueError) as error:
        return Finished("", f"cannot be started ({getattr(error, 'strerror', None) or error})")
    try:
        output, hung = _read(process, seconds)
    finally:
        _stop(process)
    text = output.decode("utf-8", "replace")
    if hung:
        return Finished(text, hung, True)
    code = process.returncode
    if code < 0:
        return Finished(text, f"was killed by {signal_name(-code)}", code=code)
    return Finished(text, f"ended with code {code}" if code else "", code=code)


def signal_name(number: int) -> str:
    """``SIGSEGV`` for 11."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read(process: subprocess.Popen[bytes], seconds: float) -> tuple[bytes, str]:
    """Output of a process until it ends, and why it has to be stopped if it does not."""
    assert process.stdout is not None
    descriptor, end = process.stdout.fileno(), time.monotonic() + seconds
    chunks: list[bytes] = []
    size = 0
    closed = False
    while True:
        left = end - time.monotonic()
        if left <= 0:
            return b"".join(chunks), f"did not finish within {seconds:g} s"
        if closed:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(left)
                return b"".join(chunks), ""
            continue
        readable, _, _ = select.select([descriptor], [], [], min(left, _POLL_SECONDS))
        if readable:
            chunk = os.read(descriptor, 1 << 16)
            closed = not chunk
            chunks.append(chunk)
            size += len(chunk)
            if size > _MOST_OUTPUT:
                return chunks[0], "printed without end"
        elif process.poll() is not None:  # something it left behind holds the pipe
            return b"".join(chunks), ""


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


IDENTITY = "clicktrain_identity"
_TRIAL_SECONDS = 60.0
_WRONG = 3

SELF_TEST = read_static("kernels/native/self_test.c")

_SCRIPT = f"""
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
if library.{IDENTITY}() != int(sys.argv[2]):
    sys.exit({_WRONG})
if len(sys.argv) > 3:
    n = 5
    numbers = range(16 * n)
    x, y = (ctypes.c_float * len(numbers))(*numbers), (ctypes.c_float * len(numbers))()
    run = library.clicktrain_self_test
    run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    run.restype = ctypes.c_int64
    expected = [float(i * i + 3) for i in numbers]
    if run(x, y, n, 2) != sum(expected) or list(y) != expected:
        sys.exit({_WRONG})
"""


def identity_of(key: str) -> int:
    """The number that a library of that key returns to prove its source."""
    return int(key[:7], 16)


def with_identity(source: str, key: str) -> str:
    """The text of a kernel and of a function that returns `identity_of` its key."""
    return f"{source}\nint {IDENTITY}(void) {{ return {identity_of(key)}; }}\n"


def why_unfit(library: Path, key: str, folder: Path, self_test: bool = False) -> str:
    """Load a library in another process, perhaps run `SELF_TEST` there: what is wrong, as a predicate."""
    if not sys.executable:  # a program that embeds Python
        return ""
    command = [sys.executable, "-I", "-S", "-c", _SCRIPT, str(library), str(identity_of(key))]
    done = run_limited([*command, *(["test"] if self_test else [])], _TRIAL_SECONDS, folder, inside=True)
    if done.hung:
        return "makes a library that hangs"
    if done.code == _WRONG:
        return "makes a library that computes nonsense"
    if done.code is not None and done.code < 0:
        return f"makes a library that crashes ({done.problem.removeprefix('was killed by ')})"
    if done.problem:
        lines = done.output.replace(f"{folder}/", "").strip().splitlines()
        return f"makes a library that cannot be loaded ({lines[-1][:300] if lines else done.problem})"
    return ""
