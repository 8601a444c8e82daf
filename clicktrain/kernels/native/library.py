"""C text -> loaded library, through a cache on disk that many processes may use at once."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from clicktrain.kernels.native.toolchain import Toolchain, needed_toolchain

Library = ctypes.CDLL
"""A loaded library; its functions take pointers and numbers as `ctypes` passes them."""


def build(source: str, tools: Toolchain | None = None) -> Path:
    """Compile C text into a shared library, or find it in the cache.

    The name is the hash of the text and of `Toolchain.identity`: the compiler's version and flags, the
    instructions that they mean on this processor, the SIMD units. The library appears under it by an atomic
    rename, so that processes may race.

    Returns:
        The library's path.

    Raises:
        RuntimeError: there is no compiler, or it refuses the text (with what it said).
    """
    tools = tools or needed_toolchain()
    key = "\n".join((source, *tools.identity))
    folder = cache_folder()
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as work:
        text = Path(work) / "kernel.c"
        text.write_text(source)
        product = Path(work) / "kernel.so"
        command = [tools.compiler, *tools.flags, str(text), "-o", str(product), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{tools.compiler} refused a generated kernel: {done.stderr.strip()[:2000]}")
        os.replace(product, path)
    return path


def build_all(sources: Sequence[str]) -> None:
    """Compile several texts side by side, as many at a time as there are processors."""
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for _ in pool.map(build, dict.fromkeys(sources)):
            pass


@functools.cache
def load(source: str) -> Library:
    """Build and load; the same library object for the same text within a process."""
    return ctypes.CDLL(str(build(source)))


def call(function: Any, *values: Any) -> Any:
    """Call a library's function: tensors as pointers, None as a null one, int as int64_t, float as double.

    A function takes the same kinds of arguments at each call: their types are declared at the first one.
    """
    if function.argtypes is None:
        function.argtypes = [_C_TYPES.get(type(value), ctypes.c_void_p) for value in values]
    return function(*[value.data_ptr() if isinstance(value, Tensor) else value for value in values])


_C_TYPES = {int: ctypes.c_int64, bool: ctypes.c_int64, float: ctypes.c_double}


@functools.cache
def cache_folder() -> Path:
    """``$CLICKTRAIN_KERNEL_CACHE``, else ``clicktrain/kernels`` in the user's cache, else a temporary folder.

    Libraries are executed: the folder is made for its owner only, and one that others can write to is
    refused in favour of a temporary one.
    """
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    wanted = os.environ.get("CLICKTRAIN_KERNEL_CACHE") or str(Path(home) / "clicktrain" / "kernels")
    folder = Path(wanted)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        safe = not folder.stat().st_mode & 0o022 and os.access(folder, os.W_OK)
    except OSError:
        safe = False
    return folder if safe else Path(tempfile.mkdtemp(prefix="clicktrain-kernels-"))
