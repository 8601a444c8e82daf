"""Keeping memory that a training step gives back, for the next step to take."""

from __future__ import annotations

import ctypes
import functools
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_PAD_BYTES = 64 << 20
STREAM_BYTES = 8 << 20
"""Kernels write results of this size around the caches: the next reader would not find them there anyway."""


@functools.cache
def keep_memory() -> bool:
    """Have the C library keep freed memory instead of returning it to the system; once per process.

    A training step takes and frees the same large tensors each time. The GNU C library maps them every time,
    and the system clears every page of them: a tenth to a fifth of a dense step, more of a sparse one. The
    price is that the process does not shrink between peaks. ``CLICKTRAIN_KEEP_MEMORY=0`` leaves it alone.

    Returns whether the C library has that switch (the GNU one), and took it.
    """
    if os.environ.get("CLICKTRAIN_KEEP_MEMORY") == "0":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    wishes = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, _PAD_BYTES))
    return all(mallopt(name, value) == 1 for name, value in wishes)
