"""Which tilings a kernel may use, and the one to take when nothing has been measured."""

from __future__ import annotations

from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase, Tiling

CACHE_VECTORS = 8192
"""Vectors of 64 bytes that a region may fill: half a megabyte, half of a usual second-level cache."""
GRAD_WEIGHT_VECTORS = 21504
"""The same for the gradient of the weight: its sums over lanes, once a region, want large ones."""
GRAD_WEIGHT_FILTERS = 128
"""Filters whose output gradients are gone through before the next ones: they stay in the cache."""


def default_tiling(
    phase: Phase, problem: ConvProblem, registers: int, lanes: int, together: int = 1
) -> Tiling:
    """The tiling that is usually best, by rule; arguments as in `candidates`."""
    return candidates(phase, problem, registers, lanes, together)[0]


def candidates(
    phase: Phase, problem: ConvProblem, registers: int, lanes: int, together: int = 1
) -> list[Tiling]:
    """Tilings worth measuring, the likeliest first.

    Args:
        phase: forward, grad_input or grad_weight.
        problem: the layer.
        registers: vector registers of the processor.
        lanes: of one of them.
        together: most filters that may be computed at once (1 where they do not share positions).
    """
    backward = phase == "grad_input"
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
    shapes = [(first, 1)] if phase == "grad_weight" and first == (4, 4) else [(first, 1), (second, 1)]
    if together >= 2 and not backward:
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
    backward = phase == "grad_input"
    axes = (problem.rows, problem.columns)
    lengths = [a.size if backward else a.out for a in axes]
    sources = problem.filters if backward else problem.channels
    results = problem.filters if phase == "grad_weight" else 0
    limit = (GRAD_WEIGHT_VECTORS if phase == "grad_weight" else CACHE_VECTORS) * 16 // lanes
    small = all(-(-length // size) <= 2 for length, size in zip(lengths, tile, strict=True))
    if small and (phase == "grad_weight" or sources * lengths[0] * lengths[1] <= 2 * limit):
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
        return window * sources + patch * min(results, GRAD_WEIGHT_FILTERS)

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
