"""The index of a layer for the kernels that take offsets of taps as data: see `generator`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clicktrain.formats.packed import Structure
from clicktrain.kernels.sparse_conv2d.blocked.indexed.generator import UNIT, IndexedGenerator
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tables import Table
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.shared.headers import distance
from clicktrain.kernels.sparse_conv2d.blocked.shared.orders import order_by, starts_of


def table(phase: Phase, problem: ConvProblem, structure: Structure, groups: int, tiling: Tiling) -> Table:
    """Every kept weight's offset, in the order in which the loop reads it.

    ``entries`` are uint16 (kept as int16): vectors from the beginning of the pass's windows. ``rows`` say,
    int32, for forward and dgrad [strided phases * passes * results + 1, 2]: first entry, first value; for
    wgrad [runs + 1, 5]: first entry (filled up to whole units), filter, vectors to
    the pass's windows, first value, values. A filter's packed values are in the order of channels and
    taps, so those of a pass are neighbors: only dgrad needs an ``order``. With
    `Tiling.pairs` an entry has two weights, those of taps next to each other in a row of their kernel,
    and ``order`` [2 * entries] says where both are; a number past the last value stands for a zero.
    """
    g = IndexedGenerator(phase, problem, tiling, torch.bfloat16 if tiling.pairs else torch.float32)
    filters, channels, r, s = structure.shape
    kernel, tap = np.divmod(structure.flat().cpu().numpy(), np.int32(r * s))
    filter_, channel = np.divmod(kernel, np.int32(channels))
    if groups > 1:
        channel = channel + filter_ // max(filters // groups, 1) * np.int32(channels)
    source, result = (filter_, channel) if phase == "dgrad" else (channel, filter_)
    known = np.array([g.offset(t) for t in range(r * s)], np.int32)
    number, place = np.divmod(source, np.int32(g.per_pass))
    offset = known[tap, 1] + place * np.int32(g.window * g.images)
    if phase == "wgrad":
        return _runs(g, result, number, source, tap, offset, known[:, 1])
    strided_phase = known[tap, 0] if g.strided_phases > 1 else 0
    runs = g.strided_phases * g.passes * g.results
    key = (strided_phase * np.int32(g.passes) + number) * np.int32(g.results) + result
    order = _order((key, runs), (source, g.sources), tap, known[:, 1])
    key = key[order]
    pairs = order[:0]
    if tiling.pairs:
        row = offset // g.columns.buffer  # windows are whole rows: one number for source and row
        order, key, pairs = _pair(order, key, row[order], offset[order], distance(phase, problem))
    first = starts_of(key, runs)
    entries, begins = offset[order], first
    if tiling.pairs:
        return Table(_int32(np.stack([first, begins], 1)), _uint16(entries), _int32(pairs))
    if phase == "forward":
        begins = np.append(order, 0)[first]
        order = order[:0]
    return Table(_int32(np.stack([first, begins], 1)), _uint16(entries), _int32(order))


def _order(
    key: tuple[np.ndarray, int], source: tuple[np.ndarray, int], tap: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    """Ascending keys, then sources, then offsets of the taps.

    Packed values are in the order of filter, channel and tap, so that sources and taps of a key ascend.
    """
    if (np.diff(offsets) > 0).all():
        return order_by(key)
    rank = np.argsort(np.argsort(offsets, kind="stable"), kind="stable").astype(np.int32)
    return order_by(key, source, (rank[tap], len(offsets)))


def _pair(
    order: np.ndarray, key: np.ndarray, row: np.ndarray, offset: np.ndarray, apart: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two weights an entry, where they are neighbors: first weights, their keys, and both [2 * entries].

    Weights of one result and row of its windows, each ``apart`` from the next, are a run: the first is paired
    with the second, the third with the fourth. That leaves as few alone as possible.
    """
    count = len(order)
    linked = np.zeros(count, bool)
    linked[1:] = (key[1:] == key[:-1]) & (row[1:] == row[:-1]) & (offset[1:] - offset[:-1] == apart)
    index = np.arange(count)
    start = np.maximum.accumulate(np.where(linked, 0, index)) if count else index
    leads = (index - start) % 2 == 0
    second = np.append(linked[1:], False)[leads]
    partner = np.append(order[1:], 0)[leads]
    both = np.stack([order[leads], np.where(second, partner, count)], 1)
    return order[leads], key[leads], both.reshape(-1)


def _runs(
    g: IndexedGenerator,
    filter_: np.ndarray,
    number: np.ndarray,
    source: np.ndarray,
    tap: np.ndarray,
    offset: np.ndarray,
    offsets: np.ndarray,
) -> Table:
    """Runs of one filter's weights in one pass, pass after pass within a block of filters."""
    block = filter_ // np.int32(g.filters_at_once)
    key = (block * np.int32(g.passes) + number) * np.int32(g.results) + filter_
    runs = -(-g.results // g.filters_at_once) * g.passes * g.results
    order = _order((key, max(runs, 1)), (source, g.sources), tap, offsets)
    sizes = np.bincount(key, minlength=1)
    keys = np.flatnonzero(sizes)
    counts = sizes[keys]
    place = np.cumsum(counts) - counts
    filled = -(-counts // UNIT) * UNIT
    starts = np.concatenate([[0], np.cumsum(filled)])
    entries = np.zeros(starts[-1], np.uint16)
    shift = (starts[:-1] - place).astype(np.int32)
    entries[np.repeat(shift, counts) + np.arange(len(order), dtype=np.int32)] = offset[order]
    windows = keys // g.results % g.passes * (g.per_pass * g.window * g.images)
    rows = np.stack([starts[:-1], keys % g.results, windows, order[place], counts], 1)
    rows = np.concatenate([rows, [[starts[-1], 0, 0, 0, 0]]])
    return Table(_int32(rows), _uint16(entries), _int32(order[:0]))


def _int32(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int32))


def _uint16(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.uint16).view(np.int16))
