"""A layer's index in the orders in which the kernels read it: built once, or again whenever masks move."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clicktrain.formats.packed import Structure
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import Taps, split_kernel
from clicktrain.kernels.sparse_conv2d.blocked.shared.orders import order_by, starts_of

NARROW = 1 << 16
"""Filters and channels that numbers of two bytes can distinguish."""
_CODED = 62
"""Positions of a kernel up to which its kept ones are the bits of a number."""


@dataclass(frozen=True, slots=True)
class Table:
    """Parts of kernels in the order of one loop.

    Attributes:
        rows: int32 [groups + 1, 2], the first entry and the first weight of each group of results; of wgrad
            [groups + 1], the first entry.
        entries: [parts, columns]: what the loop needs of a part; the columns are the loop's own. uint16, kept
            as int16; int32 where there are more than `NARROW` filters or channels.
        order: int32 [nnz], place in the packed values of each weight, in the order in which the loop reads
            (or writes) them; or [parts], of each part's first weight, if the others follow it there.
    """

    rows: Tensor
    entries: Tensor
    order: Tensor


class Parts:
    """A layer's kernels, split into the tap patterns that have code.

    ValueError where a kernel has a position that none of them has.
    """

    def __init__(self, structure: Structure, tap_patterns: tuple[Taps, ...], groups: int = 1) -> None:
        filters, channels, r, s = structure.shape
        flat = structure.flat().cpu().numpy()
        kernel, tap = np.divmod(flat, np.int32(r * s))
        first = np.flatnonzero(np.diff(kernel, prepend=-1))
        kinds, kind = _kinds(tap, first, r * s)
        splits = [split_kernel(taps, tap_patterns) for taps in kinds]
        counts = np.array([len(parts) for parts in splits] or [0])
        begins = np.cumsum(counts) - counts
        every = np.array([part for parts in splits for part in parts] or [0])
        alive = kernel[first]
        self._whole = bool(counts.max() <= 1)
        if self._whole:
            members, self.patterns = np.arange(len(first)), every[begins[kind]] if len(first) else every[:0]
        else:
            members = np.repeat(np.arange(len(first)), counts[kind])
            number = np.arange(len(members)) - np.repeat(np.cumsum(counts[kind]) - counts[kind], counts[kind])
            self.patterns = every[begins[kind[members]] + number]
        self.filter, self._local = np.divmod(alive[members], np.int32(channels))
        self.channel = self._local + self.filter // max(filters // groups, 1) * channels
        self.tap_patterns = tap_patterns
        self._first = first[members]
        self._ranks = _ranks(kinds, tap_patterns)[kind[members], self.patterns] if len(first) else None
        self._taps = np.array([len(one) for one in tap_patterns] or [0])
        self.filters, self.channels = filters, channels * groups

    def by_filter(self, filters_per_tile: int, per_pass: int = 0) -> Table:
        """For the forward pass: entries (channel, pattern) of each group of filters that agree.

        ``rows`` begin those of each group, of one pass of ``per_pass`` channels (0: all) after the other.
        """
        counts = self.filters, self.channels
        return self._by_result(self.filter, self.channel, counts, filters_per_tile, per_pass)

    def by_channel(self, per_pass: int = 0) -> Table:
        """For dgrad: entries (filter, pattern) of each channel, one pass of filters after the other."""
        return self._by_result(self.channel, self.filter, (self.channels, self.filters), 1, per_pass)

    def _by_result(
        self,
        result: np.ndarray,
        source: np.ndarray,
        counts: tuple[int, int],
        filters_per_tile: int,
        per_pass: int,
    ) -> Table:
        results, sources = counts
        passes = 1
        if 0 < per_pass < sources:
            passes = -(-sources // per_pass)
            result = source // per_pass * results + result
        order = order_by((result, results * passes), (self.patterns, self._kinds), (source, sources))
        entries = np.stack([source[order], self.patterns[order]], 1)
        rows = starts_of(result[order], results * passes)
        return self._table(order, rows, entries, filters_per_tile)

    @property
    def _kinds(self) -> int:
        return max(len(self.tap_patterns), 1)

    def by_block(self, backward: bool, results: int, sources: int) -> Table:
        """For sums in the cache: entries (source, result within its block), pattern after pattern.

        ``rows`` begin each pattern's run, of each pass of ``sources`` within each block of ``results``.
        """
        result, source = (self.channel, self.filter) if backward else (self.filter, self.channel)
        counts = (self.channels, self.filters) if backward else (self.filters, self.channels)
        results, sources = (
            min(size or count, count) for size, count in zip((results, sources), counts, strict=True)
        )
        passes, patterns = -(-counts[1] // sources), len(self.tap_patterns)
        count = -(-counts[0] // results) * passes * patterns
        runs = ((result // results) * passes + source // sources) * patterns + self.patterns
        order = order_by((runs, max(count, 1)), (source, counts[1]), (result, counts[0]))
        entries = np.stack([source[order], result[order] % results], 1)
        rows = starts_of(runs[order], count)
        table = self._table(order, rows, entries, 1)
        firsts = self._firsts(self.patterns[order], table.order)
        return table if firsts is None else replace(table, order=firsts)

    def _firsts(self, patterns: np.ndarray, order: Tensor) -> Tensor | None:
        """The places of the parts' first weights, unless some part's weights do not follow each other."""
        sizes = self._taps[patterns]
        begin = np.cumsum(sizes) - sizes
        places = order.numpy()
        firsts = places[begin]
        if (places - np.repeat(firsts, sizes) != np.arange(len(places)) - np.repeat(begin, sizes)).any():
            return None
        return torch.from_numpy(firsts)

    def by_kernel(self, filters_per_tile: int, block: int) -> Table:
        """For wgrad: entries (channel, filter, pattern), channel after channel.

        Within a block of ``block`` filters, so that their output gradients stay in the cache. ``rows`` are
        the beginnings of the runs of one channel, one block after the other.
        """
        block = max(block // filters_per_tile, 1) * filters_per_tile
        count = -(-self.filters // block)
        key = self.filter // block * self.channels + self.channel
        order = order_by(
            (key, max(count * self.channels, 1)), (self.patterns, self._kinds), (self.filter, self.filters)
        )
        entries = np.stack([self.channel[order], self.filter[order], self.patterns[order]], 1)
        rows = starts_of(key[order], count * self.channels)
        return self._table(order, rows, entries, filters_per_tile, filter_column=1)

    def agree(self, filters_per_tile: int) -> bool:
        """Whether every ``filters_per_tile`` neighboring filters have the same channels and tap patterns."""
        if filters_per_tile == 1:
            return True
        if self.filters % filters_per_tile:
            return False
        counts = np.bincount(self.filter, minlength=self.filters).reshape(-1, filters_per_tile)
        if not (counts == counts[:, :1]).all():
            return False
        groups = self.filter // filters_per_tile
        index = order_by(
            (groups, self.filters), (self.patterns, self._kinds), (self.channel, self.channels)
        )  # ties: by filter
        pairs = np.stack([self.patterns, self.channel], 1)[index].reshape(-1, filters_per_tile, 2)
        return bool((pairs == pairs[:, :1]).all())

    def _table(
        self,
        order: np.ndarray,
        rows: np.ndarray,
        entries: np.ndarray,
        filters_per_tile: int,
        filter_column: int | None = None,
    ) -> Table:
        if filters_per_tile > 1:
            order, rows, entries = self._grouped(order, rows, entries, filters_per_tile, filter_column)
        heads = order if filters_per_tile == 1 else order[::filters_per_tile]
        sizes = self._taps[self.patterns[heads]] * filters_per_tile
        begin = np.cumsum(sizes) - sizes
        places = self._places(order, heads, sizes, begin, filters_per_tile)
        if filter_column is None:
            rows = np.stack([rows, np.append(begin, sizes.sum())[rows]], 1)
        if max(self.filters, self.channels) <= NARROW:
            entries = np.ascontiguousarray(entries, dtype=np.uint16).view(np.int16)
        else:
            entries = np.ascontiguousarray(entries, dtype=np.int32)
        return Table(
            torch.from_numpy(rows.astype(np.int32)),
            torch.from_numpy(entries),
            torch.from_numpy(places),
        )

    def _places(
        self, order: np.ndarray, heads: np.ndarray, sizes: np.ndarray, begin: np.ndarray, together: int
    ) -> np.ndarray:
        """Place in the packed values of each weight, tap after tap of ``together`` filters: int32 [nnz]."""
        if self._ranks is None:
            return np.zeros(0, np.int32)
        if self._whole and together == 1:  # a kernel's values follow each other, and all are one part's
            firsts = (self._first[order] - begin).astype(np.int32)
            return np.repeat(firsts, sizes) + np.arange(int(sizes.sum()), dtype=np.int32)
        head = np.repeat(np.arange(len(heads), dtype=np.int32), sizes)
        within = np.arange(len(head), dtype=np.int32) - begin.astype(np.int32)[head]
        number, member = divmod(within, together) if together > 1 else (within, 0)
        part = order[head * together + member]
        places: np.ndarray = (self._first[part] + self._ranks[part, number]).astype(np.int32)
        return places

    def _grouped(
        self,
        order: np.ndarray,
        rows: np.ndarray,
        entries: np.ndarray,
        filters_per_tile: int,
        filter_column: int | None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bring the parts that neighboring filters share next to each other; keep one entry of each."""
        segment = np.repeat(np.arange(len(rows) - 1), np.diff(rows))
        if filter_column is None:
            segment = segment // filters_per_tile
        group = self.filter[order] // filters_per_tile
        index = np.lexsort((self.filter[order], group, self.channel[order], self.patterns[order], segment))
        order, entries = order[index], entries[index][::filters_per_tile]
        rows = rows[::filters_per_tile] if filter_column is None else rows
        return order, rows // filters_per_tile, entries


def _kinds(tap: np.ndarray, first: np.ndarray, positions: int) -> tuple[list[Taps], np.ndarray]:
    """The different sets of taps of kernels, and the number of each kernel's own.

    ``tap`` [nnz] are the taps, kernel after kernel; ``first`` [kernels] says where each kernel begins.
    """
    if not len(first):
        return [], np.zeros(0, np.int64)
    ends = np.append(first[1:], len(tap))
    if positions > _CODED:
        known: dict[Taps, int] = {}
        runs = (tuple(tap[a:b].tolist()) for a, b in zip(first, ends, strict=True))
        numbers = np.array([known.setdefault(taps, len(known)) for taps in runs])
        return [*known], numbers
    code = np.bitwise_or.reduceat(np.int64(1) << tap.astype(np.int64), first)
    if positions <= 16:
        codes = np.flatnonzero(np.bincount(code, minlength=1))
        number = np.zeros(int(codes[-1]) + 1, np.int64)
        number[codes] = np.arange(len(codes))
        kind = number[code]
    else:
        codes, kind = np.unique(code, return_inverse=True)
    return [tuple(i for i in range(positions) if one >> i & 1) for one in codes.tolist()], kind.reshape(-1)


def _ranks(kinds: list[Taps], tap_patterns: tuple[Taps, ...]) -> np.ndarray:
    """Which of a kernel's values each tap of a pattern reads: int32 [kinds, patterns, most taps]."""
    most = max(map(len, tap_patterns), default=0)
    ranks = np.zeros((len(kinds), len(tap_patterns), most), np.int32)
    for i, kind in enumerate(kinds):
        place = {tap: number for number, tap in enumerate(kind)}
        for j, taps in enumerate(tap_patterns):
            if place.keys() >= set(taps):
                ranks[i, j, : len(taps)] = [place[tap] for tap in taps]
    return ranks
