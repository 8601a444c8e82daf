"""The fixed index of a layer for the kernels that take offsets of taps as data: see `generator`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clicktrain.formats.packed import Structure
from clicktrain.kernels.sparse_conv2d.blocked.indexed.generator import UNIT, IndexedGenerator
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tables import Table
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.shared.headers import distance


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
    kept = structure.mask().cpu().numpy().reshape(filters, channels, r * s)
    filter_, channel, tap = np.nonzero(kept)
    channel = channel + filter_ // max(filters // groups, 1) * channels
    source, result = (filter_, channel) if phase == "dgrad" else (channel, filter_)
    known = [g.offset(t) for t in range(r * s)]
    strided_phase = np.array([one for one, _ in known])[tap]
    number = source // g.per_pass
    offset = np.array([one for _, one in known])[tap] + source % g.per_pass * (g.window * g.images)
    if phase == "wgrad":
        return _runs(g, result, number, offset)
    order = np.lexsort((offset, result, number, strided_phase))
    key = ((strided_phase * g.passes + number) * g.results + result)[order]
    pairs = order[:0]
    if tiling.pairs:
        row = offset // g.columns.buffer  # windows are whole rows: one number for source and row
        order, key, pairs = _pair(order, key, row[order], offset[order], distance(phase, problem))
    first = np.searchsorted(key, np.arange(g.strided_phases * g.passes * g.results + 1))
    entries, place = offset[order], first
    if tiling.pairs:
        return Table(_int32(np.stack([first, place], 1)), _uint16(entries), _int32(pairs))
    if phase == "forward":
        place = np.append(order, 0)[first]
        order = order[:0]
    return Table(_int32(np.stack([first, place], 1)), _uint16(entries), _int32(order))


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


def _runs(g: IndexedGenerator, filter_: np.ndarray, number: np.ndarray, offset: np.ndarray) -> Table:
    """Runs of one filter's weights in one pass, pass after pass within a block of filters."""
    block = filter_ // g.filters_at_once
    order = np.lexsort((offset, filter_, number, block))
    key = ((block * g.passes + number) * g.results + filter_)[order]
    keys, place, counts = np.unique(key, return_index=True, return_counts=True)
    filled = -(-counts // UNIT) * UNIT
    starts = np.concatenate([[0], np.cumsum(filled)])
    entries = np.zeros(starts[-1], np.int64)
    entries[np.repeat(starts[:-1] - place, counts) + np.arange(len(order))] = offset[order]
    windows = keys // g.results % g.passes * (g.per_pass * g.window * g.images)
    rows = np.stack([starts[:-1], keys % g.results, windows, order[place], counts], 1)
    rows = np.concatenate([rows, [[starts[-1], 0, 0, 0, 0]]])
    return Table(_int32(rows), _uint16(entries), _int32(order[:0]))


def _int32(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int32))


def _uint16(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.uint16).view(np.int16))
