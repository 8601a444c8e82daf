"""The fixed index of a layer for the kernels that take offsets of taps as data: see `tap_generator`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clicktrain.formats.packed import Structure
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.tables import Table
from clicktrain.kernels.sparse_conv2d.blocked.tap_generator import TapGenerator
from clicktrain.kernels.sparse_conv2d.blocked.tap_grad_weight import UNIT


def table(phase: Phase, problem: ConvProblem, structure: Structure, groups: int, tiling: Tiling) -> Table:
    """Every kept weight's offset, in the order in which the loop reads it.

    ``rows`` are where the weights of each result begin, [lattices * passes * results + 1]; for the gradient
    of the weight [runs + 1, 2] with the filter of each run, its weights filled up to whole units (``order``
    says -1 there).
    """
    g = TapGenerator(phase, problem, tiling)
    filters, channels, r, s = structure.shape
    kept = structure.mask().cpu().numpy().reshape(filters, channels, r * s)
    filter_, channel, tap = np.nonzero(kept)
    channel = channel + filter_ // max(filters // groups, 1) * channels
    source, result = (filter_, channel) if phase == "grad_input" else (channel, filter_)
    known = [g.offset(t) for t in range(r * s)]
    lattice = np.array([one for one, _ in known])[tap]
    offset = np.array([one for _, one in known])[tap] + source * (g.window * g.images)
    if phase == "grad_weight":
        return _runs(g, result, source // g.per_pass, offset)
    order = np.lexsort((offset, result, source // g.per_pass, lattice))
    key = (lattice * g.passes + source // g.per_pass) * g.results + result
    rows = np.searchsorted(key[order], np.arange(g.lattices * g.passes * g.results + 1))
    return Table(_int32(rows), _int32(offset[order]), _int32(order))


def _runs(g: TapGenerator, filter_: np.ndarray, number: np.ndarray, offset: np.ndarray) -> Table:
    """Runs of one filter's weights in one pass, pass after pass within a block of filters."""
    block = filter_ // g.filters_at_once
    order = np.lexsort((offset, filter_, number, block))
    key = (block * g.passes + number) * g.results + filter_
    keys, counts = np.unique(key[order], return_counts=True)
    filled = -(-counts // UNIT) * UNIT
    starts = np.concatenate([[0], np.cumsum(filled)])
    rows = np.stack([starts, np.append(keys % g.results, 0)], 1)
    place = (
        np.repeat(starts[:-1], counts) + np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    )
    entries = np.zeros(starts[-1], np.int64)
    entries[place] = offset[order]
    taken = np.full(starts[-1], -1, np.int64)
    taken[place] = order
    return Table(_int32(rows), _int32(entries), _int32(taken))


def _int32(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.int32))
