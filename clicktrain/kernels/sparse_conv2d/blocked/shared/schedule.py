"""Sizes that ``schedule.h`` and its callers agree on."""

from __future__ import annotations

CHUNKS = 4
"""Chunks of each thread, if there are several: at the end one waits for a quarter of its work at most."""
_LINE = 64


def ordered_vectors(count: int, weight_bytes: int, vector_bytes: int) -> int:
    """Vectors of scratch memory for ``count`` weights in the order of a kernel: whole cache lines."""
    line = max(_LINE // vector_bytes, 1)
    return -(-count * weight_bytes // (vector_bytes * line)) * line


def statistics_bytes(filters: int, threads: int, vector_bytes: int) -> int:
    """Memory behind the scratch memory of all threads: each one's running sums, and sums by chunk."""
    chunks = CHUNKS * threads if threads > 1 else 1
    return threads * 2 * filters * vector_bytes + chunks * 4 * filters * 8
