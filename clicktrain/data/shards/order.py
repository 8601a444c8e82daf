"""The order of a stream of shards: it depends on the seed and the epoch, and on nothing else.

Pieces of shards are shuffled as a whole and read one after the other; of what is read, each run of ``buffer``
samples is shuffled. So any place of an epoch is found without reading what comes before it, however many
processes and workers share the epoch, and whatever their number was before it was interrupted.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from clicktrain.data.draws import seeded_generator
from clicktrain.data.shards.source import Ints


class ShardOrder:
    """The order of the samples of an epoch.

    A sample has a *number* (in the order of the shards), a place in the *stream* (the order in which pieces
    are read) and a *position* (the order in which samples are trained on).
    """

    def __init__(self, counts: Ints, buffer: int, seed: int, epoch: int, *, shuffle: bool) -> None:
        self.total = int(counts.sum())
        self.buffer = max(min(buffer, self.total), 1) if shuffle else 1
        self._key, self._shuffle = (seed, epoch), shuffle
        generator = seeded_generator("pieces", seed, epoch)
        in_order = torch.arange(len(counts))
        self.pieces: Ints = (
            torch.randperm(len(counts), generator=generator) if shuffle else in_order
        ).numpy()
        """Pieces in the order in which they are read, [P]."""
        self.ends: Ints = counts[self.pieces].cumsum()
        """Place in the stream at which each of them ends, [P]."""
        self._first_numbers: Ints = (counts.cumsum() - counts)[self.pieces]
        self._window = functools.lru_cache(maxsize=4)(self._draw_window)

    def _draw_window(self, window: int) -> tuple[Ints, Ints]:
        """The shuffle of one run of the stream, and its inverse."""
        length = min(self.buffer, self.total - window * self.buffer)
        places = torch.randperm(length, generator=seeded_generator("buffer", *self._key, window))
        return places.numpy(), places.argsort().numpy()

    def places(self, start: int, stop: int) -> Ints:
        """Return the places in the stream of a run of positions, int64 [stop - start]."""
        return self._mapped(start, stop, 0)

    def positions(self, start: int, stop: int) -> Ints:
        """Return the positions of a run of places in the stream, int64 [stop - start]."""
        return self._mapped(start, stop, 1)

    def _mapped(self, start: int, stop: int, way: int) -> Ints:
        if not self._shuffle or start >= stop:
            return np.arange(start, stop)
        windows = range(start // self.buffer, (stop - 1) // self.buffer + 1)
        mapped = np.concatenate([self._window(window)[way] + window * self.buffer for window in windows])
        first = windows.start * self.buffer
        part: Ints = mapped[start - first : stop - first]
        return part

    def numbers(self, places: Ints) -> Ints:
        """Return the numbers of the samples at these places in the stream."""
        at = np.searchsorted(self.ends, places, side="right")
        starts = np.concatenate(([0], self.ends[:-1]))
        numbers: Ints = self._first_numbers[at] + places - starts[at]
        return numbers
