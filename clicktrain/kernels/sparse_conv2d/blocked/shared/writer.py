"""Writing C: lines with their indentation, macros and arrays."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

from clicktrain.kernels.native.source import expand
from clicktrain.kernels.sparse_conv2d.blocked.shared.geometry import Direction

_WIDTH = 120
_BRACES = re.compile(r'"(?:\\.|[^"\\])*"|//.*|[{}]')


class Code:
    """C source that grows line by line, indented by its braces."""

    def __init__(self, text: str) -> None:
        self._lines = [text]
        self._depth = 0

    def __call__(self, text: str) -> None:
        """Add lines. Directives and blank lines stand as they are, the others are indented and wrapped."""
        for line in map(str.strip, text.splitlines()):
            if line.startswith("#"):
                self._lines.append(line)
                continue
            braces = [part for part in _BRACES.findall(line) if part in "{}"] if _has_brace(line) else []
            closing = len(line) - len(line.lstrip("}"))
            indent = "  " * (self._depth - closing)
            self._lines += [indent + part for part in _wrapped(line, _WIDTH - len(indent))]
            self._depth += braces.count("{") - braces.count("}")
            if line == "}" and not self._depth:
                self._lines.append("")

    def include(self, path: str) -> None:
        """Add a static file of the blocked kernels."""
        self(f'#include "kernels/sparse_conv2d/blocked/{path}"')

    def array(self, name: str, numbers: Iterable[int]) -> None:
        """Add a constant array."""
        self(f"static __attribute__((unused)) const int {name}[] = {{{join(numbers)}}};")

    def for_each(self, name: str, rows: Iterable[Sequence[Sequence[int]]]) -> None:
        """Add a macro ``NAME(X)`` that applies X to the numbers of each element; a line for each row."""
        lines = [" ".join(f"X({join(numbers)})" for numbers in row) for row in rows]
        parts = [part for line in lines for part in textwrap.wrap(line, _WIDTH - 8, break_on_hyphens=False)]
        self._lines.append(" \\\n  ".join([f"#define {name}(X)", *parts]))

    def text(self) -> str:
        """The whole source, with its static files."""
        return expand("\n".join(self._lines) + "\n")


def _has_brace(line: str) -> bool:
    return "{" in line or "}" in line


def _wrapped(line: str, width: int) -> list[str]:
    """A line in parts of at most this width. Nearly all are short, and a source has thousands."""
    if 0 < len(line) <= width:
        return [line]
    return textwrap.wrap(
        line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )


def planes(sources: int, results: int, rows: Direction, columns: Direction) -> dict[str, int]:
    """The macros that say what is read and written: planes, rows and columns of both."""
    return {
        "SOURCES": sources,
        "RESULTS": results,
        "SRC_H": rows.source,
        "SRC_W": columns.source,
        "DST_H": rows.length,
        "DST_W": columns.length,
    }


def join(numbers: Iterable[int]) -> str:
    """Numbers as C arguments."""
    return ", ".join(map(str, numbers))


def among(name: str, numbers: list[int]) -> str:
    """A C condition: the variable is one of these numbers (a run of them is two comparisons)."""
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"({name} >= {numbers[0]} && {name} <= {numbers[-1]})"
    return "(" + " || ".join(f"{name} == {number}" for number in numbers) + ")"


def store_tile(code: Code, where: str, sums: list[str], columns: int) -> None:
    """Write a tile with these columns from where the C expression says, through the caches or around them."""
    places = [f"o[{i} * DST_W + {j}]" for i, j in (divmod(k, columns) for k in range(len(sums)))]
    code(f"stored *o = {where};")
    code("if (stream) {")
    for place, value in zip(places, sums, strict=True):
        code(f"STREAM(&{place}, narrow({value}));")
    code("} else {")
    for place, value in zip(places, sums, strict=True):
        code(f"{place} = narrow({value});")
    code("}")


def add_moments(code: Code, number: str, sums: list[str]) -> None:
    """Add a whole tile to the statistics of its filter (see ``statistics.h``)."""
    code("{")
    code(f"OPEN_MOMENTS({number}, {sums[0]})")
    code("vec d, s0 = {0}, q0 = {0}, s1 = {0}, q1 = {0};")
    for k, one in enumerate(sums):
        code(f"d = {one} - c; s{k % 2} += d; q{k % 2} += d * d;")
    code("m[0] += s0 + s1;")
    code("m[1] += q0 + q1;")
    code("}")
