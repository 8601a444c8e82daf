"""Loading a fresh library, first in another process: it may crash whoever loads it."""

from __future__ import annotations

import sys
from pathlib import Path

from clicktrain.kernels.native.command import run_limited
from clicktrain.kernels.native.source import read_static

IDENTITY = "clicktrain_identity"
_SECONDS = 60.0
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
    """Load a fresh library in another process: what is wrong with it, as a predicate; empty if nothing.

    It is built from a text `with_identity`; with ``self_test`` from `SELF_TEST`, which is run.
    """
    if not sys.executable:  # a program that embeds Python
        return ""
    command = [sys.executable, "-I", "-S", "-c", _SCRIPT, str(library), str(identity_of(key))]
    done = run_limited([*command, *(["test"] if self_test else [])], _SECONDS, folder, inside=True)
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
