"""Kept positions as blocks of rows that share one list: what makes a sparse product a dense one.

A *row* is what a product computes: a filter of the forward pass and of wgrad, a channel of dgrad. A *key* is
what it reads: a source (a channel, or for dgrad a filter) and a tap. The rows of a block read the union of
their keys; where a row lacks a key of its block, its weight there is zero. Filters that share channels and
patterns (``group`` of them, side by side) have equal keys, so their block has no zeros; so have channels
whose kernels agree, which is what dgrad wants. Rows of a block need not be neighbors: where masks are
frozen, rows with similar keys are put together, as in Hardware-friendly Regrouping towards Block-based
Pruning (CPAL 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clicktrain.formats.packed import Structure
from clicktrain.kernels.sparse_conv2d.batch_innermost.passes import NOWHERE, Pass

Integers = NDArray[np.int64]
MOST_TO_REGROUP = 1024
"""Rows up to which similar ones are looked for: the work grows with their square."""


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """Kept weights, a number of each array for each: result row, source, tap, place among the values."""

    rows: Integers
    sources: Integers
    taps: Integers
    places: Integers
    row_count: int

    def of(self, given: Pass) -> Entries:
        """Those whose tap a pass reads."""
        used = np.zeros(int(self.taps.max(initial=0)) + 1, dtype=bool)
        used[[tap for tap in given.offsets if tap < len(used)]] = True
        kept = used[self.taps]
        rows, sources, taps, places = (one[kept] for one in (self.rows, self.sources, self.taps, self.places))
        return Entries(rows, sources, taps, places, self.row_count)


def entries_of(structure: Structure, groups: int) -> tuple[Entries, Entries]:
    """Kept weights for forward and wgrad, with filters as rows, and for dgrad, with channels."""
    f, c, r, s = structure.shape
    flat = structure.flat().cpu().numpy().astype(np.int64)
    filters, columns = np.divmod(flat, max(structure.row_length, 1))
    channels, taps = np.divmod(columns, r * s)
    channels = channels + filters // (f // groups) * c
    places = np.arange(len(flat), dtype=np.int64)
    forward = Entries(filters, channels, taps, places, f)
    backward = Entries(channels, filters, taps, places, c * groups)
    return forward, backward


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Tables of a product whose rows come in blocks; those that kernels read are int32.

    Attributes:
        rows: [blocks * M] row of the result, -1 for none.
        starts: [blocks + 1] where the keys of each block begin; multiples of BK.
        block_of: [keys / BK] the block of each tile of keys.
        offsets, taps: [keys] as `block_kernels` has them.
        places: int64 [keys * M], in the order of the tiles [keys / BK, M, BK]: which value each weight is,
            the number of values for a zero.
        tiles: int64 [values], where each value is among these weights.
        kept: share of what is multiplied that are values; NaN where it was not counted.
    """

    rows: Tensor
    starts: Tensor
    block_of: Tensor
    offsets: Tensor
    taps: Tensor
    places: Tensor
    tiles: Tensor
    kept: float = float("nan")

    @property
    def keys(self) -> int:
        """Keys of all blocks, with what fills them up."""
        return self.offsets.numel()


def offsets_and_taps(sources: Integers, taps: Integers, given: Pass) -> tuple[Integers, Integers]:
    """Flat places in the source and pairs of offsets, of keys."""
    rows = np.zeros(max(given.offsets, default=0) + 1, dtype=np.int64)
    columns = rows.copy()
    for tap, offset in given.offsets.items():
        rows[tap], columns[tap] = offset
    height, width = given.source
    down, across = rows[taps], columns[taps]
    return sources * height * width + down * width + across, _pair(down, across)


def _pair(down: Integers, across: Integers) -> Integers:
    return (across << 16) | (down & 0xFFFF)


_FILLING = (NOWHERE << 16) | NOWHERE


def blocks_of(entries: Entries, given: Pass, values: int, m: int, bk: int, regroup: bool) -> Blocks:
    """Put rows into blocks of ``m``, and fill up their keys to multiples of ``bk``.

    Args:
        entries: all kept weights; those of other taps than the pass's are left out.
        values: how many values there are.
        regroup: whether similar rows may be put together; else blocks are of neighbors.
    """
    own = entries.of(given)
    taps = max(given.offsets, default=0) + 1
    keys = own.sources * taps + own.taps
    order = row_order(own, keys, m, regroup)
    block_count = max(-(-len(order) // m), 1)
    rows = np.full(block_count * m, -1, dtype=np.int64)
    rows[: len(order)] = order
    place_of_row = np.zeros(own.row_count, dtype=np.int64)
    place_of_row[order] = np.arange(len(order))
    # A block's keys, in the order of sources: what one reads is near to what the next one does.
    width = int(keys.max(initial=0)) + 1
    block_keys, where = np.unique(place_of_row[own.rows] // m * width + keys, return_inverse=True)
    of_block, key = np.divmod(block_keys, width)
    counts = np.bincount(of_block, minlength=block_count)
    padded = -(-counts // bk) * bk
    starts = np.concatenate([[0], padded.cumsum()])
    place_of_key = starts[of_block] + np.arange(len(of_block)) - (counts.cumsum() - counts)[of_block]
    total = int(starts[-1])
    offsets = np.zeros(total, dtype=np.int64)
    pairs = np.full(total, _FILLING, dtype=np.int64)
    offsets[place_of_key], pairs[place_of_key] = offsets_and_taps(key // taps, key % taps, given)
    at = place_of_key[where.reshape(-1)]
    tiles_of = at // bk * (m * bk) + place_of_row[own.rows] % m * bk + at % bk
    places = np.full(total * m, values, dtype=np.int64)
    places[tiles_of] = own.places
    tiles = np.zeros(values, dtype=np.int64)
    tiles[own.places] = tiles_of
    block_of = np.repeat(np.arange(block_count), padded // bk)
    return Blocks(
        _table(rows),
        _table(starts),
        _table(block_of),
        _table(offsets),
        _table(pairs),
        torch.from_numpy(places),
        torch.from_numpy(tiles),
        len(own.places) / max(total * m, 1),
    )


def row_order(entries: Entries, keys: Integers, m: int, regroup: bool) -> Integers:
    """The rows in the order in which blocks of ``m`` take them."""
    natural = np.arange(entries.row_count)
    if not regroup or not m < entries.row_count <= MOST_TO_REGROUP:
        return natural
    distinct, number = np.unique(keys, return_inverse=True)
    members = np.zeros((entries.row_count, len(distinct)), dtype=np.float32)
    members[entries.rows, number.reshape(-1)] = 1
    similar = _similar_order(members, m)
    return similar if _union(members, similar, m) < _union(members, natural, m) else natural


def _similar_order(members: NDArray[np.float32], m: int) -> Integers:
    """Block after block: the row with the most keys, then whichever adds the fewest to the block's union."""
    size = members.sum(1)
    left = np.ones(len(members), dtype=bool)
    order = []
    for place in range(len(members)):
        if place % m == 0:
            union = np.zeros(members.shape[1], dtype=np.float32)
            shared = np.zeros(len(members), dtype=np.float32)
            cost = -size
        else:
            cost = size - shared
        row = int(np.where(left, cost, np.inf).argmin())
        left[row] = False
        order.append(row)
        fresh = np.flatnonzero((members[row] > 0) & (union == 0))
        union[fresh] = 1
        shared = shared + members[:, fresh].sum(1)
    return np.array(order, dtype=np.int64)


def _union(members: NDArray[np.float32], order: Integers, m: int) -> int:
    return sum(int(members[order[at : at + m]].any(0).sum()) for at in range(0, len(order), m))


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Tables of a product whose rows have kept positions of their own; int32, but for ``order``.

    Attributes:
        rows: [programs * M] row of the result, -1 for none: those with equally many values side by side.
        starts: [rows + 1].
        longest: [programs].
        offsets, taps: [nnz] as `block_kernels` has them.
        order: int64 [nnz] which value each is.
        tiles: [programs of wgrad, 3], as `row_kernels.weight_gradient_rows` has them.
    """

    rows: Tensor
    starts: Tensor
    longest: Tensor
    offsets: Tensor
    taps: Tensor
    order: Tensor
    tiles: Tensor


def rows_of(entries: Entries, given: Pass, m: int, bk: int) -> Rows:
    """Tables of rows that share nothing, ``m`` a program of the product, ``bk`` values a program of wgrad."""
    own = entries.of(given)
    order = np.lexsort((own.taps, own.sources, own.rows))
    counts = np.bincount(own.rows, minlength=own.row_count)
    starts = np.concatenate([[0], counts.cumsum()])
    by_length = np.argsort(-counts, kind="stable")
    programs = max(-(-len(by_length) // m), 1)
    rows = np.full(programs * m, -1, dtype=np.int64)
    rows[: len(by_length)] = by_length
    longest = np.where(rows < 0, 0, np.append(counts, 0)[rows]).reshape(programs, m).max(1)
    offsets, taps = offsets_and_taps(own.sources[order], own.taps[order], given)
    tiles = [
        (row, int(starts[row]) + at, min(bk, count - at))
        for row, count in enumerate(counts.tolist())
        for at in range(0, count, bk)
    ]
    return Rows(
        _table(rows),
        _table(starts),
        _table(longest),
        _table(offsets),
        _table(taps),
        torch.from_numpy(own.places[order]),
        torch.tensor(tiles, dtype=torch.int32).view(-1, 3),
    )


def _table(numbers: Integers) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int32))
