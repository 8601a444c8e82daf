"""Masks of layers as pictures: one cell per kernel, colored by its pattern."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from clicktrain.report.patterns import Pool, pools
from clicktrain.report.run_data import Run, kernel_density, number
from clicktrain.report.svg import coordinate, element, picture

MOST_FILTERS, MOST_CHANNELS = 64, 96
"""Kernels shown of a layer: more would be too small to see."""

CORNER_FILTERS, CORNER_CHANNELS = 9, 9
"""Kernels of the zoomed corner."""

_DROPPED, _OTHER = 0, -1  # else the rank of a pattern, from 1


@dataclass(frozen=True, slots=True)
class MaskPicture:
    """A layer's mask, drawn."""

    layer: str
    why: str
    shape: tuple[int, ...]
    shown: tuple[int, int]
    kernels: float
    weights: float
    whole: Markup
    corner: Markup | None

    @property
    def cropped(self) -> bool:
        """Whether the layer has more kernels than are shown."""
        return self.shown != self.shape[:2]

    @property
    def width(self) -> int:
        """Widest and tallest that the picture should be shown, as its width in pixels."""
        filters, channels = self.shown
        return round(min(22 * channels, 560 * channels / filters))

    @property
    def per_kernel(self) -> bool:
        """Whether a kernel is a single weight."""
        return self.shape[2:] == (1, 1)


def mask_pictures(run: Run, most: int = 3) -> tuple[MaskPicture, ...]:
    """Pictures of a few layers: the largest, the one that kept most and the one that kept least."""
    by_shape = {pool.shape: pool for pool in pools(run)}
    return tuple(_draw(run, layer, why, by_shape) for layer, why in _telling(run)[:most])


def _telling(run: Run) -> list[tuple[str, str]]:
    density = {str(layer.get("name")): number(layer, "density") for layer in run.layers}
    left = {name: value for name, value in density.items() if value is not None and value < 1}
    pruned = [name for name in left if name in run.weight_shapes]
    with_patterns = [name for name in pruned if run.weight_shapes[name][2:] != (1, 1)]
    names = with_patterns or pruned
    chosen: dict[str, list[str]] = {}
    for why, key, best in (
        ("the largest pruned layer", lambda n: math.prod(run.weight_shapes[n]), max),
        ("the layer that kept the largest share", left.__getitem__, max),
        ("the layer that kept the smallest share", left.__getitem__, min),
    ):
        if names:
            chosen.setdefault(best(names, key=key), []).append(why)
    return [(name, " and ".join(whys)) for name, whys in chosen.items()]


def _draw(run: Run, layer: str, why: str, by_shape: Mapping[tuple[int, int], Pool]) -> MaskPicture:
    keep = run.keep(layer)
    f, c, r, s = keep.shape
    rows, columns = min(f, MOST_FILTERS), min(c, MOST_CHANNELS)
    part = keep[:rows, :columns]
    ranks = _ranks(part, by_shape.get((r, s)))
    label = f"{layer}: kept kernels of {rows} filters and {columns} channels"
    whole = _whole(ranks, label, corner=(r, s) != (1, 1))
    corner = None if (r, s) == (1, 1) else _corner(part, ranks, layer)
    shares = kernel_density(keep), float(keep.mean())
    return MaskPicture(layer, why, (f, c, r, s), (rows, columns), *shares, whole, corner)


def _ranks(keep: NDArray[np.bool_], pool: Pool | None) -> list[list[int]]:
    """Rank of each kernel's pattern; 0 for dropped kernels, -1 for kept ones that follow no pattern.

    A weight inside a pattern may happen to be zero, so the first pattern that holds all kept positions
    counts.
    """
    positions = keep.shape[2] * keep.shape[3]
    bits = keep.reshape(*keep.shape[:2], positions) @ (2 ** np.arange(positions, dtype=np.int64))
    patterns = [] if pool is None else pool.by_score
    rank = {
        b: _DROPPED if b == 0 else next((p.rank for p in patterns if p.bits & b == b), _OTHER)
        for b in set(bits.ravel().tolist())
    }
    return [[rank[b] for b in row] for row in bits.tolist()]


def _css(rank: int) -> str:
    return "pat-other" if rank == _OTHER else f"pat-{(rank - 1) % 12 + 1}"


def _runs(ranks: Sequence[Sequence[int]]) -> Iterable[tuple[int, int, int, int]]:
    """Neighboring kernels of one rank, joined: (rank, row, first column, number)."""
    for i, row in enumerate(ranks):
        begin = 0
        for j in range(1, len(row) + 1):
            if j == len(row) or row[j] != row[begin]:
                if row[begin] != _DROPPED:
                    yield row[begin], i, begin, j - begin
                begin = j


def _colored(paths: Mapping[str, Sequence[str]]) -> list[Markup]:
    return [element("path", d="".join(data), class_=f"on {css}") for css, data in sorted(paths.items())]


def _whole(ranks: Sequence[Sequence[int]], label: str, *, corner: bool) -> Markup:
    """One unit per kernel, one path per color, so that thousands of kernels stay a small file."""
    height, width = len(ranks), len(ranks[0])
    paths: dict[str, list[str]] = {}
    for rank, i, j, length in _runs(ranks):
        paths.setdefault(_css(rank), []).append(f"M{j} {i}h{length}v1h-{length}z")
    parts = [element("rect", x=0, y=0, width=width, height=height, class_="dropped"), *_colored(paths)]
    if corner and (height > CORNER_FILTERS or width > CORNER_CHANNELS):
        size = {"width": min(width, CORNER_CHANNELS), "height": min(height, CORNER_FILTERS)}
        parts.append(element("rect", x=0, y=0, class_="corner-frame", **size))
    return picture(width, height, label, parts, "mask")


def _corner(keep: NDArray[np.bool_], ranks: Sequence[Sequence[int]], layer: str) -> Markup:
    """The first kernels, with each of their R x S weights."""
    rows, columns = min(len(ranks), CORNER_FILTERS), min(len(ranks[0]), CORNER_CHANNELS)
    r, s = keep.shape[2], keep.shape[3]
    step_y, step_x = r + 0.7, s + 0.7
    parts = []
    paths: dict[str, list[str]] = {}
    for i in range(rows):
        for j in range(columns):
            y, x = 0.1 + i * step_y, 0.1 + j * step_x
            css = "kernel" if ranks[i][j] == _DROPPED else "kernel kept"
            parts.append(element("rect", x=x, y=y, width=s, height=r, rx=0.2, class_=css))
            for u, v in np.argwhere(keep[i, j]).tolist():
                place = f"M{coordinate(x + v + 0.06)} {coordinate(y + u + 0.06)}h.88v.88h-.88z"
                paths.setdefault(_css(ranks[i][j]), []).append(place)
    parts += _colored(paths)
    label = f"{layer}: the kept weights of the first {rows} filters and {columns} channels"
    return picture(columns * step_x - 0.5, rows * step_y - 0.5, label, parts, "corner")
