"""C source -> loaded library, through a cache on disk that many processes may use at once."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.kernels.native import sealed
from clicktrain.kernels.native.c_compiler import Toolchain, needed_toolchain
from clicktrain.kernels.native.command import IDENTITY, identity_of
from clicktrain.kernels.native.compilation import compile_kernel, keep_source
from clicktrain.kernels.native.failure import KernelError, report_failure
from clicktrain.kernels.native.folder import cache_folder, mark_used, tidy, unwritable, work_folder

Library = ctypes.CDLL
"""A loaded library; its functions take pointers and numbers as `ctypes` passes them."""


def build(source: str, tools: Toolchain | None = None) -> Path:
    """Compile C text into a shared library, or find it in the cache; returns its path.

    Its name has the hash of the text and of `Toolchain.identity`, and its own length and hash: see `sealed`.
    What the cache has is compared with its name, what is compiled has been loaded by another process first.
    ``CLICKTRAIN_KEEP_SOURCE=1`` keeps the text beside it, as ``KEY.c``.

    Raises:
        KernelError: there is no compiler, it fails on this text, or the library cannot be kept.
    """
    tools = tools or needed_toolchain()
    folder, key = cache_folder(), _key(source, tools)
    path = sealed.find(folder, key)
    if path is None:
        tidy(folder)
        with work_folder(folder) as work:
            product = compile_kernel(source, key, tools, work)
            try:
                path = sealed.store(product, folder, key)
            except OSError as error:
                raise unwritable(folder, error) from error
    else:
        mark_used(path)
    if _keeps_sources():
        keep_source(folder, source, key)
    return path


def _keeps_sources() -> bool:
    value = os.environ.get("CLICKTRAIN_KEEP_SOURCE", "")
    if value not in ("", "0", "1"):
        raise UserError(f"CLICKTRAIN_KEEP_SOURCE is {value!r}: set it to 0 or 1, or leave it unset")
    return value == "1"


def build_all(sources: Iterable[str]) -> dict[str, KernelError]:
    """Build and load texts side by side: those that failed, and why, which `watch_failures` also collects."""
    failed = _build_all(sources)
    for error in failed.values():
        report_failure(error)
    return failed


def need_all(sources: Iterable[str]) -> None:
    """`build_all` for kernels that are all needed; raises the first KernelError."""
    for error in _build_all(sources).values():
        raise error


def _build_all(sources: Iterable[str]) -> dict[str, KernelError]:
    def attempt(source: str) -> KernelError | None:
        try:
            load(source)
        except KernelError as error:
            return error
        return None

    texts = [text for text in dict.fromkeys(sources) if text]  # empty: built elsewhere
    pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1)
    try:
        results = list(pool.map(attempt, texts))
    finally:
        pool.shutdown(cancel_futures=True)
    return {text: error for text, error in zip(texts, results, strict=True) if error is not None}


@functools.cache
def load(source: str) -> Library:
    """Build and load, as `build`; the same library object for the same text within a process."""
    tools = needed_toolchain()
    why = ""
    for _ in range(2):  # another process may remove a library that it finds damaged or unused
        path = build(source, tools)
        try:
            library = Library(str(path))
            if getattr(library, IDENTITY)() == identity_of(_key(source, tools)):
                return library
            why = "it is another kernel's"
        except (OSError, AttributeError) as error:
            why = str(error)
        sealed.discard(path)
    raise KernelError(
        f"a library of the kernel cache {cache_folder()} cannot be loaded ({why}): set "
        "CLICKTRAIN_KERNEL_CACHE to a folder of your own, on a disk that may run programs"
    )


def _key(source: str, tools: Toolchain) -> str:
    return sealed.key_of(source, *tools.identity)


def call(function: Any, *values: Any) -> Any:
    """Call a library's function: tensors as pointers, None as a null one, int as int64_t, float as double.

    A function takes the same kinds of arguments at each call: their types are declared at the first one.
    """
    if function.argtypes is None:
        function.argtypes = [_C_TYPES.get(type(value), ctypes.c_void_p) for value in values]
    arguments = list(values)
    for place, value in enumerate(values):  # not a comprehension: that is one more Python call per kernel
        if isinstance(value, Tensor):
            arguments[place] = value.data_ptr()
    return function(*arguments)


_C_TYPES = {int: ctypes.c_int64, bool: ctypes.c_int64, float: ctypes.c_double}
