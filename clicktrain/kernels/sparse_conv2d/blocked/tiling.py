"""Tilings worth measuring, and the one to take when nothing has been measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from clicktrain.kernels.sparse_conv2d.blocked.indexed.generator import OFFSETS, window_vectors
from clicktrain.kernels.sparse_conv2d.blocked.patterns.regions import IN_PLACE_CODE, AxisRegions, code_size
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import Taps
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.shared.geometry import Backward, Forward, StridedAxis

Pair = tuple[int, int]
CACHE_VECTORS = 8192
"""SIMD vectors of 64 bytes that a region may fill: half a megabyte, half of L2."""
WGRAD_VECTORS = 12288
"""The same for wgrad: its sums over lanes, once a region, want large regions, and L2 is read beside them."""
WGRAD_FILTERS = 128
"""Filters whose output gradients are used before the next ones: they stay in the cache."""
PAIRED_WGRAD_TILE = (2, 4)
"""Twelve sums have to be on their way at a time, which leaves registers for few gradients."""
PAIRED_COLUMNS = 6
"""Most columns of a larger tile in pairs: fewer jumps; with more sums cells are loaded again."""
PAIRED_SOURCES = 16
"""Sources of a pass in pairs where there are many: twice as fast, kernels wait for windows from L2."""
MOST_IN_ROW = 8
"""Tiles of a region that then takes all of a row, at most: its copy has each window once."""
FEW_SUMS = 12
"""Sums of a tile below which there are no such passes."""
IMAGE_VECTORS, MOST_IMAGES = 12800, 4
"""Vectors of 64 bytes of a region of unrolled wgrad with several blocks of small images, and most of them."""
INDEXED_VECTORS = 256
"""Vectors of 64 bytes of a tile's windows in one pass of indexed code: half of L1."""
REGION_POSITIONS = (256, 128)
"""Positions of a region of indexed wgrad: lanes are summed once for each."""
FEW_POSITIONS = 64
"""Positions below which such a region has several blocks of images."""
CACHE_BLOCKED_VECTORS = ((1024, 144), (768, 288))
"""Vectors of 64 bytes that a block's sums and a pass's windows may fill of cache-blocked code.

Sums may leave L1, windows should not: measured, 8 sources of 4x4 tiles and all results.
"""
CACHE_BLOCKED_REGION_VECTORS, CACHE_BLOCKED_REGION_TILES = 12288, 64
"""Vectors of 64 bytes that such code copies of a region, and tiles of one: each is a call in the text."""
CACHE_BLOCKED_TAPS = 3
"""Mean taps of a pattern from which on cache-blocked code can pay: each kernel loads and stores its sums."""
CACHE_BLOCKED_WORK = 1 << 19
"""Multiply-adds of a layer on one image, dense, below which its code takes longer to build than it saves."""
CACHE_BLOCKED_CODE = 3200
"""Multiply-adds of all patterns on one tile, beyond which the code does not fit the instruction cache."""


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

    Unrolled code wants few patterns and many registers, cache-blocked code few patterns of several taps; else
    indexed code comes first.

    Args:
        phase, problem: of the layer.
        registers, lanes: of the processor's vectors.
        tap_patterns: those with code of their own.
        filters_per_tile: most filters that may be computed at once (1 where they do not share positions).
        complete: whether each kernel has one of the patterns.
        copied: whether no code can read the source itself, because it has another dtype.
    """
    unrolled = _unrolled_candidates(phase, problem, registers, lanes, filters_per_tile)
    indexed = _indexed_candidates(phase, problem, registers, lanes)
    blocked = []
    if phase != "wgrad" and complete:
        blocked = _cache_blocked_candidates(
            phase, problem, lanes, sum(map(len, tap_patterns)), len(tap_patterns), copied
        )
    if registers >= 32 and complete:
        return [*unrolled, *blocked, *indexed[:1]]
    if blocked:
        # The others differ by 3% at most with 16 registers, and each takes two seconds to build.
        return [blocked[0], *indexed[:1], *(unrolled[:1] if filters_per_tile > 1 else ())]
    return [*indexed, *(unrolled if filters_per_tile > 1 else unrolled[:1])]


def pair_candidates(
    phase: Phase,
    problem: ConvProblem,
    tilings: Sequence[Tiling],
    registers: int,
    lanes: int,
    complete: bool = True,
) -> list[Tiling]:
    """What is worth measuring where pairs of bfloat16 numbers can be multiplied; ``tilings`` is so without.

    Of code for tap patterns that is pairs, and one without. Indexed code pairs taps of a row: kernels of one
    column have none.
    """
    indexed = [replace(one, pairs=True) for one in tilings if one.code == "indexed"]
    patterns = complete and registers >= 32 and any(one.code == "unrolled" for one in tilings)
    if phase == "wgrad":
        shape = (4, 4) if max(problem.rows.out, problem.columns.out) <= 8 else PAIRED_WGRAD_TILE
        own = [one for one in tilings if one.code == "unrolled"]
        if patterns:
            own = [_tiling(phase, problem, shape, 1, lanes, halves=2)]
        return [*(replace(one, pairs=True) for one in own), *indexed, *tilings[:1]]
    if problem.rows.taps * problem.columns.taps == 1:
        return list(tilings)
    if not patterns:
        return [*tilings, *(indexed if problem.columns.taps > 1 else ())]
    backward = phase == "dgrad"
    sources = problem.filters if backward else problem.channels
    length = problem.columns.size if backward else problem.columns.out
    second = 4, 7 if length == 7 else -(-length // -(-length // PAIRED_COLUMNS))
    per_pass = _even(sources, PAIRED_SOURCES) if sources >= 4 * PAIRED_SOURCES else 0
    own = [_tiling(phase, problem, shape, 1, lanes) for shape in ((4, 4), second)]
    # What is loaded and stored between passes is not worth it for the smallest tiles.
    large = [per_pass if math.prod(one.tile) >= FEW_SUMS else 0 for one in own]
    paired = [
        replace(_in_rows(one, length) if count else one, sources=count, pairs=True)
        for one, count in zip(own, large, strict=True)
    ]
    shared = [replace(one, pairs=True) for one in tilings if one.filters_per_tile > 1]
    return [*dict.fromkeys([*shared[:1], *paired]), *tilings[:1]]


def _in_rows(tiling: Tiling, columns: int) -> Tiling:
    """A region of one row of tiles, if it has no more, takes all of a row: of passes it need not fit L2."""
    if tiling.region[0] > 1:
        return tiling
    return replace(tiling, region=(1, min(-(-columns // tiling.tile[1]), MOST_IN_ROW)))


def _unrolled_candidates(
    phase: Phase, problem: ConvProblem, registers: int, lanes: int, filters_per_tile: int
) -> list[Tiling]:
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
    return list(dict.fromkeys(_tiling(phase, problem, shape, filters, lanes) for shape, filters in shapes))


def _tiling(
    phase: Phase, problem: ConvProblem, shape: Pair, filters: int, lanes: int, halves: int = 1
) -> Tiling:
    """Unrolled code with tiles of about that shape; ``halves`` is 2 where vectors have half the size."""
    tile = []
    for size, axis in zip(shape, (problem.rows, problem.columns), strict=True):
        length = axis.size if phase == "dgrad" else axis.out
        step = axis.stride if phase == "dgrad" else 1
        tile.append(min(max(size // step, 1) * step, -(-length // step) * step))
    limit = (WGRAD_VECTORS if phase == "wgrad" else CACHE_VECTORS) * 16 // lanes
    region = _region(phase, problem, (tile[0], tile[1]), limit)
    images = 1
    if phase == "wgrad" and all(axis.out <= 8 for axis in (problem.rows, problem.columns)):
        # Lanes are summed up once a region.
        vectors = problem.channels * problem.rows.size * problem.columns.size
        vectors += problem.filters * problem.rows.out * problem.columns.out
        images = min(max(IMAGE_VECTORS * halves * 16 // lanes // max(vectors, 1), 1), MOST_IMAGES)
    return Tiling((tile[0], tile[1]), region, filters, images=images)


def _region(phase: Phase, problem: ConvProblem, tile: tuple[int, int], limit: int) -> tuple[int, int]:
    """Tiles per region: as many as ``limit`` vectors hold, so that little is packed twice."""
    backward = phase == "dgrad"
    axes = (problem.rows, problem.columns)
    lengths = [a.size if backward else a.out for a in axes]
    sources = problem.filters if backward else problem.channels
    results = problem.filters if phase == "wgrad" else 0
    small = all(-(-length // size) <= 2 for length, size in zip(lengths, tile, strict=True))
    if small and (phase == "wgrad" or sources * lengths[0] * lengths[1] <= 2 * limit):
        return 2, 2  # its padding is not in the code, so it can be read where it is

    def vectors(candidate: Pair) -> int:
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

    return _grown(
        tile,
        lengths,
        lambda larger: vectors(larger) <= limit,
        lambda r: (max(r[0] * tile[0], r[1] * tile[1]), vectors(r)),
    )


def _grown(
    tile: Sequence[int], lengths: Sequence[int], fits: Callable[[Pair], bool], cost: Callable[[Pair], Any]
) -> Pair:
    """Double a region of tiles along either axis, the cheaper one each time, while it fits and is of use."""
    region = 1, 1
    while True:
        down, across = region
        larger = [(down, 2 * across)] if across * tile[1] < lengths[1] else []
        larger += [(2 * down, across)] if down * tile[0] < lengths[0] else []
        if not (fitting := [*filter(fits, larger)]):
            return region
        region = min(fitting, key=cost)


def _cache_blocked_candidates(
    phase: Phase, problem: ConvProblem, lanes: int, taps: int, patterns: int, copied: bool
) -> list[Tiling]:
    backward = phase == "dgrad"
    axes = (problem.rows, problem.columns)
    steps = [a.stride if backward else 1 for a in axes]
    lengths = [-(-(a.size if backward else a.out) // step) for a, step in zip(axes, steps, strict=True)]
    columns = _cache_blocked_columns(lengths[1])
    rows = _cache_blocked_rows(lengths[0], columns)
    work = problem.filters * problem.channels * math.prod(axis.taps * axis.out for axis in axes)
    few_taps = taps < CACHE_BLOCKED_TAPS * max(patterns, 1)
    if work < CACHE_BLOCKED_WORK or few_taps or taps * rows * columns > CACHE_BLOCKED_CODE:
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
    wide = min(-(-lengths[1] // columns), CACHE_BLOCKED_REGION_TILES)
    in_place = [AxisRegions(direction(axis), size, 1, True) for axis, size in zip(axes, tile, strict=True)]
    if copied or code_size(in_place[0], in_place[1], taps) > IN_PLACE_CODE:
        room = CACHE_BLOCKED_REGION_VECTORS * 16 // lanes // (windows[0] * windows[1] * sources)
        wide = min(wide, max(room, 2))
    tilings = []
    for for_sums, for_windows in CACHE_BLOCKED_VECTORS:
        block = _even(results, for_sums * 16 // lanes // (tile[0] * tile[1]))
        part = _even(sources, for_windows * 16 // lanes // (windows[0] * windows[1]))
        tilings.append(Tiling(tile, (1, wide), code="cache_blocked", sources=part, results=block))
    return list(dict.fromkeys(tilings))


def _cache_blocked_rows(length: int, columns: int) -> int:
    """Rows of a tile with these columns: about 16 positions, or all of a small image."""
    if length <= 7:
        return length
    if length % 4 and length % 2 == 0 and columns > 4:
        return 2
    return 4


def _cache_blocked_columns(length: int) -> int:
    """Columns of a tile: about four, or seven where that divides the image and four does not."""
    if length <= 7 or length % 4 == 0 or length > 28:
        return 4 if length % 4 == 0 or length > 28 else length
    return 7 if length % 7 == 0 else -(-length // round(length / 4.5))


def _even(count: int, most: int) -> int:
    """The size of parts of about the same size, none larger than ``most``; 0 for a single one."""
    parts = -(-count // max(most, 1))
    return 0 if parts <= 1 else -(-count // parts)


def _indexed_candidates(phase: Phase, problem: ConvProblem, registers: int, lanes: int) -> list[Tiling]:
    """Tilings for indexed code; none where windows are too large for its offsets."""
    tilings = (
        _indexed_wgrad(problem, lanes)
        if phase == "wgrad"
        else _indexed_accumulate(phase, problem, registers, lanes)
    )
    return [one for one in tilings if window_vectors(phase, problem, one) <= OFFSETS]


def _indexed_accumulate(phase: Phase, problem: ConvProblem, registers: int, lanes: int) -> list[Tiling]:
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
    per_pass = max(INDEXED_VECTORS * 16 // lanes // (window[0] * window[1]), 1)

    def buffer(region: Pair) -> int:
        return math.prod(StridedAxis(a, t, n).buffer for a, t, n in zip(axes, tile, region, strict=True))

    most = CACHE_VECTORS // 2 * 16 // lanes
    region = _grown(
        tile,
        counts,
        lambda larger: buffer(larger) * sources <= most,
        lambda larger: (buffer(larger) / (larger[0] * larger[1]), larger),
    )
    tilings = []
    for count in (per_pass, 2 * per_pass):
        passes = -(-sources // count)
        even = -(-sources // passes)
        tilings.append(Tiling(tile, region, code="indexed", sources=0 if passes == 1 else even))
    return list(dict.fromkeys(tilings))


def _indexed_wgrad(problem: ConvProblem, lanes: int) -> list[Tiling]:
    rows, columns = problem.rows.out, problem.columns.out
    wide = -(-columns // 8)
    width = -(-columns // wide)
    tilings = []
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
        free = INDEXED_VECTORS * 16 // lanes * 5 // 4 - down * width * across * images
        per_pass = min(max(free // (window * images), 4), problem.channels)
        tilings.append(Tiling((1, width), (down, across), code="indexed", sources=per_pass, images=images))
    return list(dict.fromkeys(tilings))
