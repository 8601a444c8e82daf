"""C source of the transposition: ``blocked_layout.c`` and a generated tile of V x V numbers in registers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from clicktrain.kernels.native.source import begin_source, expand


def source(dtype: torch.dtype, lanes: int) -> str:
    """The functions ``block`` and ``unblock`` for one dtype and V, a power of two."""
    about = f"Conversion between [N, C, H, W] and [N/{lanes}, C, H, W, {lanes}]."
    return expand(
        begin_source(about, dtype, lanes)
        + '#include "kernels/blocked_layout/shuffles.h"\n'
        + _tile(lanes, dtype.itemsize)
        + '#include "kernels/blocked_layout/blocked_layout.c"\n'
    )


def _tile(lanes: int, size: int) -> str:
    rows = range(lanes)
    lines = [
        "",
        "INLINE void tile(const number *from, int64_t from_row, number *to, int64_t to_row,",
        "                 const int64_t rows, const int64_t out) {",
        "  const numbers zero = {0};",
        f"  numbers {', '.join(f'r{i}' for i in rows)};",
        *(f"  r{i} = {i} < rows ? *(const numbers *)(from + {i} * from_row) : zero;" for i in rows),
        *_transpose(lanes, size),
        *(f"  if ({i} < out) *(numbers *)(to + {i} * to_row) = r{i};" for i in rows),
        "}",
        "",
    ]
    return "\n".join(lines)


def _transpose(lanes: int, size: int) -> Iterator[str]:
    """Rounds over pairs of registers that are ``step`` apart; each exchanges one bit of row and column.

    Within 128 bits pairs are interleaved, which is one instruction a register for numbers of any size: column
    bits rotate there, and after the last of these rounds all are in their places. Larger steps swap the
    off-diagonal quarters of a square.
    """
    near = min(16 // size, lanes)
    half = near // 2
    step = lanes // 2
    while step:
        if step < near:
            first = [i for start in range(0, lanes, near) for i in range(start, start + half)]
            low = [i for j in first for i in (j, lanes + j)]
            high = [i + half for i in low]
        else:
            low = [lanes + j - step if j & step else j for j in range(lanes)]
            high = [i + step for i in low]
        for i in range(lanes):
            if not i & step:
                a, b = f"r{i}", f"r{i + step}"
                mixed = (f"MIX(a, b, {', '.join(map(str, indices))})" for indices in (low, high))
                yield "  {"
                yield f"    const numbers a = {a}, b = {b};"
                yield from (f"    {one} = {new};" for one, new in zip((a, b), mixed, strict=True))
                yield "  }"
        step //= 2
