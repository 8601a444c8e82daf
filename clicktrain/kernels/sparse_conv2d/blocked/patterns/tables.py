"""A layer's index in the orders in which the kernels read it, built once after the hard prune."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from clicktrain.formats.packed import Structure
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import Taps, split_kernel

NARROW = 1 << 16
"""Filters and channels that numbers of two bytes can distinguish."""


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
    """A layer's kernels, split into the tap patterns that have code."""

    def __init__(self, structure: Structure, tap_patterns: tuple[Taps, ...], groups: int = 1) -> None:
        filters, channels, r, s = structure.shape
        mask = structure.mask().cpu().numpy().reshape(filters, channels, r * s)
        place = (np.cumsum(mask.reshape(-1)) - 1).reshape(mask.shape)
        alive_f, alive_c = np.nonzero(mask.any(2))
        rows = mask[alive_f, alive_c]
        kinds, kind = np.unique(rows, axis=0, return_inverse=True) if len(rows) else (rows, alive_f)
        kind = kind.reshape(-1)
        splits: list[tuple[np.ndarray, int]] = []
        for number, one in enumerate(kinds):
            members = np.nonzero(kind == number)[0]
            splits.extend(
                (members, part) for part in split_kernel(tuple(np.nonzero(one)[0].tolist()), tap_patterns)
            )
        none = [np.zeros(0, np.int64)]
        members = np.concatenate([m for m, _ in splits] or none)
        self.patterns = np.concatenate([np.full(len(m), p) for m, p in splits] or none)
        self.filter = alive_f[members]
        self.channel = alive_c[members] + self.filter // max(filters // groups, 1) * channels
        self._local = alive_c[members]
        self._place = place
        self.tap_patterns = tap_patterns
        self._taps = np.array([len(one) for one in tap_patterns] or [0])
        self.filters, self.channels = filters, channels * groups

    def by_filter(self, filters_per_tile: int, sources: int = 0) -> Table:
        """For the forward pass: entries (channel, pattern) of each group of filters that agree.

        ``rows`` begin those of each group, of one pass of ``sources`` (0: all) after the other.
        """
        return self._by_result(self.filter, self.channel, (self.filters, self.channels), filters_per_tile, sources)

    def by_channel(self, sources: int = 0) -> Table:
        """For dgrad: entries (filter, pattern) of each channel, pass after pass."""
        return self._by_result(self.channel, self.filter, (self.channels, self.filters), 1, sources)

    def _by_result(
        self,
        result: np.ndarray,
        source: np.ndarray,
        counts: tuple[int, int],
        filters_per_tile: int,
        sources: int,
    ) -> Table:
        count = counts[0]
        per_pass = min(sources or counts[1], counts[1]) or 1
        row = source // per_pass * count + result
        order = np.lexsort((source, self.patterns, row))
        entries = np.stack([source[order], self.patterns[order]], 1)
        rows = np.searchsorted(row[order], np.arange(-(-counts[1] // per_pass) * count + 1))
        return self._table(order, rows, entries, filters_per_tile)

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
        runs = ((result // results) * passes + source // sources) * patterns + self.patterns
        order = np.lexsort((result, source, runs))
        entries = np.stack([source[order], result[order] % results], 1)
        rows = np.searchsorted(runs[order], np.arange(-(-counts[0] // results) * passes * patterns + 1))
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
        blocks = self.filter // block
        order = np.lexsort((self.filter, self.patterns, self.channel, blocks))
        entries = np.stack([self.channel[order], self.filter[order], self.patterns[order]], 1)
        count = -(-self.filters // block)
        key = blocks[order] * self.channels + self.channel[order]
        rows = np.searchsorted(key, np.arange(count * self.channels + 1))
        return self._table(order, rows, entries, filters_per_tile, filter_column=1)

    def agree(self, filters_per_tile: int) -> bool:
        """Whether every ``filters_per_tile`` neighboring filters have the same channels and tap patterns."""
        if filters_per_tile == 1:
            return True
        if self.filters % filters_per_tile:
            return False
        order = np.lexsort((self.channel, self.patterns, self.filter))
        rows = np.searchsorted(self.filter[order], np.arange(self.filters + 1))
        counts = np.diff(rows).reshape(-1, filters_per_tile)
        if not (counts == counts[:, :1]).all():
            return False
        groups = self.filter[order] // filters_per_tile
        index = np.lexsort((self.filter[order], self.channel[order], self.patterns[order], groups))
        pairs = np.stack([self.patterns[order], self.channel[order]], 1)[index].reshape(
            -1, filters_per_tile, 2
        )
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
        places = np.zeros(int(sizes.sum()), np.int64)
        for number, one in enumerate(self.tap_patterns):
            index = np.nonzero(self.patterns[heads] == number)[0]
            for i, tap in enumerate(one):
                for j in range(filters_per_tile):
                    member = order[index * filters_per_tile + j]
                    places[begin[index] + i * filters_per_tile + j] = self._place[
                        self.filter[member], self._local[member], tap
                    ]
        if filter_column is None:
            rows = np.stack([rows, np.append(begin, sizes.sum())[rows]], 1)
        if max(self.filters, self.channels) <= NARROW:
            entries = np.ascontiguousarray(entries, dtype=np.uint16).view(np.int16)
        else:
            entries = np.ascontiguousarray(entries, dtype=np.int32)
        return Table(
            torch.from_numpy(rows.astype(np.int32)),
            torch.from_numpy(entries),
            torch.from_numpy(places.astype(np.int32)),
        )

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
