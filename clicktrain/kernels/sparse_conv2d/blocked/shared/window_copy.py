"""Copies of a region's rows into a buffer: ``window_copy.h`` with the numbers of a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from clicktrain.kernels.sparse_conv2d.blocked.shared.writer import Code

CASES = 4
"""Ways of copying a row that get code of their own: at either edge of an image, between them."""


def write_copy(
    code: Code, name: str, steps: Sequence[int], columns: Sequence[tuple[int, int]], width: int
) -> None:
    """The functions ``copy_NAME(copy, rows)``, which goes on, and ``NAME_of``, which begins.

    Args:
        code: written to.
        name: ``windows`` of the source, or ``gradients`` of the output.
        steps: vectors from one row, plane and image of the buffer to the next.
        columns: (first column, columns) of the regions, for code without loops.
        width: of what is copied.
    """
    planes, size = ("SOURCES", "SRC") if name == "windows" else ("RESULTS", "DST")
    shape = f"{planes}, {size}_H, {size}_W, {', '.join(f'{step}L' for step in steps)}"
    code(f"NOINLINE void copy_{name}(copy_t *a, long count) {{")
    for begin, end, count in _frequent(columns, width):
        code(f"if (a->c0 == {begin} && a->c1 == {end} && a->cols == {count}) {{")
        code(f"copy_rows(a, count, {begin}, {end}, {count}, {shape});")
        code("return;")
        code("}")
    code(f"copy_rows(a, count, a->c0, a->c1, a->cols, {shape});")
    code("}")
    parameters = "const stored *from, cell *to, long images, int row, int rows, int col, int cols"
    code(f"NOINLINE copy_t {name}_of({parameters}) {{")
    code(f"return begin_copy(from, to, images, row, rows, col, cols, {planes}, {size}_W);")
    code("}")


def _frequent(columns: Iterable[tuple[int, int]], width: int) -> list[tuple[int, int, int]]:
    """First and last column inside the source, and columns, of the most frequent regions."""
    cases = []
    for first, count in columns:
        begin = min(max(-first, 0), count)
        cases.append((begin, max(min(count, width - first), begin), count))
    return [case for case, _ in Counter(cases).most_common(CASES)]
