"""What the static files of this folder take: operand types, sizes of the schedule, copies of windows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase
from clicktrain.kernels.sparse_conv2d.blocked.shared.writer import Code


def distance(phase: Phase, problem: ConvProblem) -> int:
    """Columns of the source between what neighboring taps of a row read for one result."""
    axis = problem.columns
    if phase == "dgrad":
        return axis.dilation // math.gcd(axis.dilation, axis.stride)
    return axis.dilation


def as_stored(phase: Phase, pairs: bool, dtype: torch.dtype) -> bool:
    """Whether activations are computed with as they lie in memory, without a copy of another dtype."""
    return dtype is not torch.bfloat16 or (pairs and phase == "wgrad")


def operand_macros(phase: Phase, problem: ConvProblem, pairs: bool) -> dict[str, int | str]:
    """The macros of ``operand_types.h``."""
    if not pairs:
        return {"PAIRS": "NONE"}
    return {"PAIRS": "IMAGES" if phase == "wgrad" else "COLUMNS", "DISTANCE": distance(phase, problem)}


def halves_apart(operands: Mapping[str, int | str]) -> int:
    """DISTANCE of ``operand_types.h``, with those macros."""
    return int(operands.get("DISTANCE", 1))


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


CASES = 4
"""Ways of copying a row that get code of their own: at either edge of an image, between them."""


def write_copy(
    code: Code, name: str, steps: Sequence[int], columns: Sequence[tuple[int, int]], width: int, apart: int
) -> None:
    """The functions ``copy_NAME(copy, rows)``, which goes on, and ``NAME_of``, which begins.

    Args:
        code: written to.
        name: ``windows`` of the source, or ``gradients`` of the output.
        steps: vectors from one row, plane and image of the buffer to the next.
        columns: (first column, columns) of the regions, for code without loops.
        width: of what is copied.
        apart: columns between the halves of a pair.
    """
    planes, size = ("SOURCES", "SRC") if name == "windows" else ("RESULTS", "DST")
    shape = f"{planes}, {size}_H, {size}_W, {', '.join(f'{step}L' for step in steps)}"
    code(f"NOINLINE void copy_{name}(copy_t *a, long count) {{")
    for begin, end, second, count in _frequent(columns, width, apart):
        code(f"if (a->c0 == {begin} && a->c1 == {end} && a->c2 == {second} && a->cols == {count}) {{")
        code(f"copy_rows(a, count, {begin}, {end}, {second}, {count}, {shape});")
        code("return;")
        code("}")
    code(f"copy_rows(a, count, a->c0, a->c1, a->c2, a->cols, {shape});")
    code("}")
    parameters = "const stored *from, cell *to, long images, int row, int rows, int col, int cols"
    code(f"NOINLINE copy_t {name}_of({parameters}) {{")
    code(f"return begin_copy(from, to, images, row, rows, col, cols, {planes}, {size}_W);")
    code("}")


def _frequent(columns: Iterable[tuple[int, int]], width: int, apart: int) -> list[tuple[int, int, int, int]]:
    """First and last column inside the source, last of pairs, and columns, of the most frequent regions."""
    cases = []
    for first, count in columns:
        begin = min(max(-first, 0), count)
        end = max(min(count, width - first), begin)
        cases.append((begin, end, max(min(count, width - first - apart), 0), count))
    return [case for case, _ in Counter(cases).most_common(CASES)]
