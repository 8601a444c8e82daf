"""A ring-allreduce that is carried out: real numbers travel step by step, and every step is timed."""

from __future__ import annotations

import itertools
from collections import defaultdict

from clicktrain.cluster import Cluster

Gpu = tuple[int, ...]
"""Place on each level, from the inside out."""


def simulate(elements: int, cluster: Cluster, itemsize: int = 4) -> tuple[float, float]:
    """Sum a message of all GPUs; seconds, and bytes that a GPU sends (the mean). Checks the sums."""
    levels = cluster.levels
    gpus = [
        tuple(reversed(place))
        for place in itertools.product(*(range(level.size) for level in reversed(levels)))
    ]
    data = {
        gpu: [1000 * number + position for position in range(elements)] for number, gpu in enumerate(gpus)
    }
    expected = [sum(column) for column in zip(*data.values(), strict=True)]
    region = dict.fromkeys(gpus, (0, elements))  # what a GPU still has to sum up
    ring = dict.fromkeys(gpus, 0)  # which of the rings side by side it is in
    seconds, sent = 0.0, 0
    done = []
    for depth, level in enumerate(levels):
        before = dict(region), dict(ring)
        done.append(before)
        for step in range(level.size - 1):
            moves = [(gpu, (gpu[depth] - step) % level.size) for gpu in gpus]
            taken, bytes_sent = carry_out(moves, data, before, cluster, depth, itemsize, add=True)
            seconds, sent = seconds + taken, sent + bytes_sent
        for gpu in gpus:
            chunk = (gpu[depth] + 1) % level.size
            region[gpu] = chunk_of(before[0][gpu], chunk, level.size)
            ring[gpu] = ring[gpu] * level.size + chunk
    for depth, level in reversed(list(enumerate(levels))):
        for step in range(level.size - 1):
            moves = [(gpu, (gpu[depth] + 1 - step) % level.size) for gpu in gpus]
            taken, bytes_sent = carry_out(moves, data, done[depth], cluster, depth, itemsize, add=False)
            seconds, sent = seconds + taken, sent + bytes_sent
    assert all(values == expected for values in data.values())
    return seconds, sent / len(gpus)


def chunk_of(region: tuple[int, int], chunk: int, parts: int) -> tuple[int, int]:
    """The chunk-th part of a run of elements; the first parts are the larger ones."""
    start, stop = region
    sizes = [len(range(part, stop - start, parts)) for part in range(parts)]
    first = start + sum(sizes[:chunk])
    return first, first + sizes[chunk]


def carry_out(
    moves: list[tuple[Gpu, int]],
    data: dict[Gpu, list[int]],
    before: tuple[dict[Gpu, tuple[int, int]], dict[Gpu, int]],
    cluster: Cluster,
    depth: int,
    itemsize: int,
    *,
    add: bool,
) -> tuple[float, int]:
    """All GPUs send a chunk to their neighbors at the same time; seconds and bytes of all."""
    level = cluster.levels[depth]
    regions, rings = before
    on_link: dict[tuple[Gpu, int], int] = defaultdict(int)
    arriving = []
    for gpu, chunk in moves:
        start, stop = chunk_of(regions[gpu], chunk, level.size)
        neighbor = (*gpu[:depth], (gpu[depth] + 1) % level.size, *gpu[depth + 1 :])
        assert regions[neighbor] == regions[gpu]
        arriving.append((neighbor, start, data[gpu][start:stop]))
        on_link[gpu[depth:], rings[gpu] % level.lanes] += (stop - start) * itemsize
    for neighbor, start, values in arriving:
        for position, value in enumerate(values, start):
            data[neighbor][position] = data[neighbor][position] + value if add else value
    longest = max(on_link.values())
    return level.link.latency + longest / level.link.bandwidth, sum(on_link.values())
