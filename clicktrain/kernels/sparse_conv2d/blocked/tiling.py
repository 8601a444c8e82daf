"""Which tilings a kernel may use, and the one to take when nothing has been measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from clicktrain.kernels.sparse_conv2d.blocked.indexed.generator import OFFSETS, window_vectors
from clicktrain.kernels.sparse_conv2d.blocked.indexed.strided_phase import StridedAxis
from clicktrain.kernels.sparse_conv2d.blocked.patterns.regions import IN_PLACE_CODE, AxisRegions, code_size
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import Taps
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.shared.geometry import Backward, Forward

CACHE_VECTORS = 8192
"""Vectors of 64 bytes that a region may fill: half a megabyte, half of a usual second-level cache."""
WGRAD_VECTORS = 21504
"""The same for the gradient of the weight: its sums over lanes, once a region, want large ones."""
WGRAD_FILTERS = 128
"""Filters whose output gradients are gone through before the next ones: they stay in the cache."""
TAP_VECTORS = 256
"""Vectors of 64 bytes of a tile's windows in one pass over taps as data: half of a first-level cache."""
REGION_POSITIONS = (256, 128)
"""Positions of a region of the gradient of the weight over taps as data: lanes are summed once for each."""
FEW_POSITIONS = 64
"""Positions below which such a region has several blocks of images."""
SWEEP_VECTORS = ((1024, 144), (768, 288))
"""Vectors of 64 bytes that a block's sums and a pass's windows may fill where tap sets sweep over a tile.

Sums may leave the first-level cache, windows should not: measured, 8 sources of 4x4 tiles and all results.
"""
SWEEP_REGION_VECTORS, SWEEP_REGION_TILES = 12288, 64
"""Vectors of 64 bytes that such code copies of a region, and tiles of one: each is a call in the text."""
SWEEP_TAPS = 3
"""Taps of a set, in the mean, from which on sweeping can pay: each kernel loads and stores its sums anew."""
SWEEP_WORK = 1 << 19
"""Multiply-adds of a layer on one image, dense, below which its code takes longer to build than it saves."""
SWEEP_CODE = 3200
"""Multiply-adds of all sets on one tile, beyond which the code is too large for its cache."""


def candidates(
    phase: Phase,
    problem: ConvProblem,
    registers: int,
    lanes: int,
    tap_patterns: Sequence[Taps] = (),
    filters_per_tile: int = 1,
    complete: bool = True,
    copied: bool = False,
) -> list[Tiling]:
    """Tilings worth measuring, the likeliest first.

    Code for tap sets wants layers with few sets, and many registers or kernels of several taps over which it
    can sweep; else taps as data come first.

    Args:
        phase: forward, dgrad or wgrad.
        problem: the layer.
        registers: vector registers of the processor.
        lanes: of one of them.
        tap_patterns: the tap sets that there is code for.
        filters_per_tile: most filters that may be computed at once (1 where they do not share positions).
        complete: whether each kernel is one of the tap sets that there is code for.
        copied: whether no code can read the source itself, because it is kept in another type.
    """
    sets = _set_candidates(phase, problem, registers, lanes, filters_per_tile)
    taps = tap_candidates(phase, problem, registers, lanes)
    sweeps = []
    if phase != "wgrad" and complete:
        sweeps = _sweep_candidates(
            phase, problem, lanes, sum(map(len, tap_patterns)), len(tap_patterns), copied
        )
    if registers >= 32 and complete:
        return [*sets, *sweeps, *taps[:1]]
    if sweeps:
        # The others differ by 3% at most with 16 registers, and each takes two seconds to build.
        return [sweeps[0], *taps[:1], *(sets[:1] if filters_per_tile > 1 else ())]
    return [*taps, *(sets if filters_per_tile > 1 else sets[:1])]


def pair_candidates(phase: Phase, problem: ConvProblem, tilings: Sequence[Tiling]) -> list[Tiling]:
    """Those of the tilings that can multiply pairs of bfloat16 numbers, doing so.

    Forward and gradient of the input pair taps of a row: kernels of one column have none.
    """
    if phase == "wgrad":
        return [replace(one, pairs=True) for one in tilings]
    if problem.columns.taps == 1:
        return []
    return [replace(one, pairs=True) for one in tilings if one.code == "indexed"]


def _set_candidates(
    phase: Phase, problem: ConvProblem, registers: int, lanes: int, filters_per_tile: int
) -> list[Tiling]:
    """Tilings for code of tap sets."""
    backward = phase == "dgrad"
    axes = (problem.rows, problem.columns)
    lengths = [a.size if backward else a.out for a in axes]
    if registers >= 32:
        square, flat, pair = (4, 4), (2, 8), (2, 4)
        # Sizes of ImageNet networks: 14 is two sevens, where fours would leave half a tile over.
        sevens = lengths[1] % 4 != 0 and lengths[1] % 7 == 0 and lengths[1] > 7
        first = (2, 7) if sevens else square
        second = square if sevens else flat
    else:
        first, second, pair = (2, 4), (2, 3), (1, 4)
    shapes = [(first, 1)] if phase == "wgrad" and first == (4, 4) else [(first, 1), (second, 1)]
    if filters_per_tile >= 2 and not backward:
        # Two filters halve the loads; more leave too few positions for the taps of a window to share.
        shapes = [(pair, 2), *shapes[:1]] if min(lengths) > 4 else [*shapes[:1], (pair, 2)]
    found = []
    for shape, filters in shapes:
        tile = []
        for size, axis, length in zip(shape, axes, lengths, strict=True):
            step = axis.stride if backward else 1
            tile.append(min(max(size // step, 1) * step, -(-length // step) * step))
        region = _region(phase, problem, (tile[0], tile[1]), lanes)
        found.append(Tiling((tile[0], tile[1]), region, filters))
    return list(dict.fromkeys(found))


def _region(phase: Phase, problem: ConvProblem, tile: tuple[int, int], lanes: int) -> tuple[int, int]:
    """Tiles per region: as many as the cache holds, so that little is packed twice."""
    backward = phase == "dgrad"
    axes = (problem.rows, problem.columns)
    lengths = [a.size if backward else a.out for a in axes]
    sources = problem.filters if backward else problem.channels
    results = problem.filters if phase == "wgrad" else 0
    limit = (WGRAD_VECTORS if phase == "wgrad" else CACHE_VECTORS) * 16 // lanes
    small = all(-(-length // size) <= 2 for length, size in zip(lengths, tile, strict=True))
    if small and (phase == "wgrad" or sources * lengths[0] * lengths[1] <= 2 * limit):
        return 2, 2  # its padding is not in the code, so it can be read where it is
    region = [1, 1]

    def vectors(candidate: list[int]) -> int:
        window, patch = 1, 1
        for axis, size, count, length in zip(axes, tile, candidate, lengths, strict=True):
            positions = min(size * count, length)
            reach = (axis.taps - 1) * axis.dilation
            window *= (
                positions // axis.stride + reach + 1
                if backward
                else (positions - 1) * axis.stride + reach + 1
            )
            patch *= positions
        return window * sources + patch * min(results, WGRAD_FILTERS)

    while True:
        grown = []
        for axis_number in (1, 0):
            larger = list(region)
            larger[axis_number] *= 2
            useful = region[axis_number] * tile[axis_number] < lengths[axis_number]
            if useful and vectors(larger) <= limit:
                grown.append(larger)
        if not grown:
            return region[0], region[1]
        region = min(grown, key=lambda r: (max(r[0] * tile[0], r[1] * tile[1]), vectors(r)))


def _sweep_candidates(
    phase: Phase, problem: ConvProblem, lanes: int, taps: int, sets: int, copied: bool
) -> list[Tiling]:
    """Tilings for code of tap sets that sweeps, with sums in the cache; none where it cannot pay."""
    backward = phase == "dgrad"
    axes = (problem.rows, problem.columns)
    steps = [a.stride if backward else 1 for a in axes]
    lengths = [-(-(a.size if backward else a.out) // step) for a, step in zip(axes, steps, strict=True)]
    columns = _sweep_columns(lengths[1])
    rows = _sweep_rows(lengths[0], columns)
    work = problem.filters * problem.channels * math.prod(axis.taps * axis.out for axis in axes)
    if work < SWEEP_WORK or taps < SWEEP_TAPS * max(sets, 1) or taps * rows * columns > SWEEP_CODE:
        return []
    tile = rows * steps[0], columns * steps[1]
    direction = Backward if backward else Forward
    windows = [
        min(direction(axis).window(0, size)[1], axis.out if backward else axis.size)
        for axis, size in zip(axes, tile, strict=True)
    ]
    results, sources = problem.filters, problem.channels
    if backward:
        results, sources = sources, results
    # Whole rows of tiles, which are read without gaps; of copies as many as the cache holds.
    wide = min(-(-lengths[1] // columns), SWEEP_REGION_TILES)
    in_place = [AxisRegions(direction(axis), size, 1, True) for axis, size in zip(axes, tile, strict=True)]
    if copied or code_size(in_place[0], in_place[1], taps) > IN_PLACE_CODE:
        room = SWEEP_REGION_VECTORS * 16 // lanes // (windows[0] * windows[1] * sources)
        wide = min(wide, max(room, 2))
    found = []
    for for_sums, for_windows in SWEEP_VECTORS:
        block = _even(results, for_sums * 16 // lanes // (tile[0] * tile[1]))
        part = _even(sources, for_windows * 16 // lanes // (windows[0] * windows[1]))
        found.append(Tiling(tile, (1, wide), code="cache_blocked", sources=part, results=block))
    return list(dict.fromkeys(found))


def _sweep_rows(length: int, columns: int) -> int:
    """Rows of a tile of so many columns: about 16 positions, or all of a small image."""
    if length <= 7:
        return length
    if length % 4 and length % 2 == 0 and columns > 4:
        return 2
    return 4


def _sweep_columns(length: int) -> int:
    """Columns of a tile: about four, or seven where that divides the image and four does not."""
    if length <= 7 or length % 4 == 0 or length > 28:
        return 4 if length % 4 == 0 or length > 28 else length
    return 7 if length % 7 == 0 else -(-length // round(length / 4.5))


def _even(count: int, most: int) -> int:
    """The size of parts of about the same size, none larger than ``most``; 0 for a single one."""
    parts = -(-count // max(most, 1))
    return 0 if parts <= 1 else -(-count // parts)


def tap_candidates(phase: Phase, problem: ConvProblem, registers: int, lanes: int) -> list[Tiling]:
    """Tilings for code that takes taps as data, the likeliest first; arguments as in `candidates`.

    None where windows are too large for its offsets (kernels that reach over hundreds of pixels).
    """
    found = (
        _indexed_wgrad(problem, lanes)
        if phase == "wgrad"
        else _tap_accumulate(phase, problem, registers, lanes)
    )
    return [one for one in found if window_vectors(phase, problem, one) <= OFFSETS]


def _tap_accumulate(phase: Phase, problem: ConvProblem, registers: int, lanes: int) -> list[Tiling]:
    direction = Backward if phase == "dgrad" else Forward
    axes = direction(problem.rows), direction(problem.columns)
    counts = [StridedAxis(axis, 1, 1).count for axis in axes]
    sums = registers - 4
    shapes = [(i, j) for i in range(1, 5) for j in range(1, sums + 1) if i * j <= sums]
    shapes = [(min(i, counts[0]), min(j, counts[1])) for i, j in shapes]

    def cost(shape: tuple[int, int]) -> tuple[float, int]:
        tiles = -(-counts[0] // shape[0]) * -(-counts[1] // shape[1])
        window = [StridedAxis(a, n, 1).buffer for a, n in zip(axes, shape, strict=True)]
        # Fewer than eight sums wait for each other; each tap has its own broadcast and loop.
        return tiles * (max(shape[0] * shape[1], 8) + 1.5), window[0] * window[1]

    tile = min(dict.fromkeys(shapes), key=cost)
    sources = problem.filters if phase == "dgrad" else problem.channels
    window = [StridedAxis(axis, size, 1).buffer for axis, size in zip(axes, tile, strict=True)]
    per_pass = max(TAP_VECTORS * 16 // lanes // (window[0] * window[1]), 1)
    region = [1, 1]
    while True:
        grown = []
        for number in (1, 0):
            larger = list(region)
            larger[number] *= 2
            buffers = [StridedAxis(a, t, n).buffer for a, t, n in zip(axes, tile, larger, strict=True)]
            if region[number] * tile[number] < counts[number] and (
                buffers[0] * buffers[1] * sources <= CACHE_VECTORS // 2 * 16 // lanes
            ):
                grown.append((buffers[0] * buffers[1] / (larger[0] * larger[1]), larger))
        if not grown:
            break
        region = min(grown)[1]
    found = []
    for count in (per_pass, 2 * per_pass):
        passes = -(-sources // count)
        even = -(-sources // passes)
        found.append(Tiling(tile, (region[0], region[1]), code="indexed", sources=0 if passes == 1 else even))
    return list(dict.fromkeys(found))


def _indexed_wgrad(problem: ConvProblem, lanes: int) -> list[Tiling]:
    rows, columns = problem.rows.out, problem.columns.out
    wide = -(-columns // 8)
    width = -(-columns // wide)
    found = []
    for size in REGION_POSITIONS:
        positions = size * 8 // max(lanes, 8)
        # Wide images are cut: of one row, most of what is copied would be the rows above and below.
        across = min(wide, max(positions // (width * min(rows, 4)), 1))
        most = max(positions // (width * across), 1)
        # A region costs about as much beside its rows as one row.
        down = min(range(1, min(most, rows) + 1), key=lambda size: -(-rows // size) * (size + 1))
        axes = Forward(problem.rows), Forward(problem.columns)
        window = StridedAxis(axes[0], 1, down).buffer * StridedAxis(axes[1], width, across).buffer
        images = max(FEW_POSITIONS // (down * columns), 1) if down == rows and across == wide else 1
        free = TAP_VECTORS * 16 // lanes * 5 // 4 - down * width * across * images
        per_pass = min(max(free // (window * images), 4), problem.channels)
        found.append(Tiling((1, width), (down, across), code="indexed", sources=per_pass, images=images))
    return list(dict.fromkeys(found))
