"""Pattern pools as pictures, and how often each pattern was chosen."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from clicktrain.report.run_data import Run, number
from clicktrain.report.svg import coordinate, element, picture

COLORS = 12
"""Pattern colors of the page's style; more patterns begin again with the first."""

_CELL, _GAP = 12.0, 1.5


@dataclass(frozen=True, slots=True)
class DrawnPattern:
    """A pattern of a pool: rank from 1, bits (bit r*S+s = position [r, s] kept) and competitive score."""

    rank: int
    bits: int
    shape: tuple[int, int]
    score: float | None

    @property
    def css(self) -> str:
        """Class that gives its color."""
        return f"pat-{(self.rank - 1) % COLORS + 1}"

    @property
    def rows(self) -> str:
        """In characters, as in ``##./##./...``."""
        r, s = self.shape
        return "/".join("".join("#" if self.kept(i, j) else "." for j in range(s)) for i in range(r))

    @property
    def entries(self) -> int:
        """Number of kept positions."""
        return self.bits.bit_count()

    def kept(self, row: int, column: int) -> bool:
        """Whether a position is kept."""
        return bool(self.bits >> (row * self.shape[1] + column) & 1)

    @property
    def picture(self) -> Markup:
        """R x S cells: filled where a weight is kept."""
        r, s = self.shape
        cells = []
        for i, j in itertools.product(range(r), range(s)):
            place = {"x": j * _CELL + _GAP / 2, "y": i * _CELL + _GAP / 2}
            size = {"width": _CELL - _GAP, "height": _CELL - _GAP, "rx": 1.5}
            css = f"on {self.css}" if self.kept(i, j) else "off"
            cells.append(element("rect", **place, **size, class_=css))
        return picture(s * _CELL, r * _CELL, f"pattern {self.rank}: {self.rows}", cells, "pattern")


@dataclass(frozen=True, slots=True)
class Pool:
    """The patterns that kernels of one shape may take, in their order in the pool."""

    shape: tuple[int, int]
    patterns: tuple[DrawnPattern, ...]
    candidates: int

    @property
    def title(self) -> str:
        """``3×3 kernels``."""
        return f"{self.shape[0]}×{self.shape[1]} kernels"  # noqa: RUF001

    @property
    def by_score(self) -> tuple[DrawnPattern, ...]:
        """Best first."""
        return tuple(sorted(self.patterns, key=lambda p: p.rank))

    @property
    def top_score(self) -> float:
        """The highest competitive score; at least 1."""
        return max([1.0, *(p.score for p in self.patterns if p.score is not None)])

    @property
    def scored(self) -> bool:
        """Whether the patterns competed; given pools have no scores."""
        return any(p.score is not None for p in self.patterns)


def pools(run: Run) -> tuple[Pool, ...]:
    """The run's pattern pools; those of kernels that are kept or dropped whole are left out."""
    pools = []
    for record in (run.event("pool") or {}).get("pools", ()):
        shape = (int(record["shape"][0]), int(record["shape"][1]))
        whole = (1 << shape[0] * shape[1]) - 1
        listed = [(int(p["bits"]), number(p, "score")) for p in record["patterns"]]
        if any(bits != whole for bits, _ in listed):
            order = sorted(range(len(listed)), key=lambda i: (-(listed[i][1] or 0.0), i))
            rank = {index: place + 1 for place, index in enumerate(order)}
            drawn = (DrawnPattern(rank[i], bits, shape, score) for i, (bits, score) in enumerate(listed))
            pools.append(Pool(shape, tuple(drawn), int(number(record, "candidates") or 0)))
    return tuple(pools)


@dataclass(frozen=True, slots=True)
class PatternUse:
    """Shares of a layer's kept kernels by pattern, in the pool's order by score."""

    layer: str
    kernels: int
    shares: tuple[float, ...]


def pattern_use(run: Run, pool: Pool) -> tuple[PatternUse, ...]:
    """How often each pattern of a pool was chosen, per layer."""
    rows = []
    for layer in decided_layers(run):
        counts = layer.get("pattern_counts") or []
        if tuple(layer.get("shape", ())[2:]) == pool.shape and len(counts) == len(pool.patterns):
            whole = sum(counts)
            ordered = sorted(zip(pool.patterns, counts, strict=True), key=lambda pair: pair[0].rank)
            shares = tuple(count / whole if whole else 0.0 for _, count in ordered)
            rows.append(PatternUse(str(layer.get("name")), whole, shares))
    return tuple(rows)


def overall_use(rows: Sequence[PatternUse]) -> PatternUse | None:
    """All layers together."""
    whole = sum(row.kernels for row in rows)
    if not whole:
        return None
    columns = zip(*([share * row.kernels for share in row.shares] for row in rows), strict=True)
    return PatternUse("all layers", whole, tuple(sum(column) / whole for column in columns))


def decided_layers(run: Run) -> Sequence[Mapping[str, Any]]:
    """Layers of the event with which patterns and kernels were fixed."""
    layers: Sequence[Mapping[str, Any]] = (run.event("finalised") or {}).get("layers", ())
    return layers


def cell_text(value: float) -> str:
    """A share in percent, without its sign; a small share is not shown as zero."""
    return "0" if value == 0 else "<1" if value < 0.005 else coordinate(round(100 * value))
