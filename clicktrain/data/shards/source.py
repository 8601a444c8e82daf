"""What shards hold: pieces, which are read as a whole, and the samples in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from clicktrain.data.draws import seeded_generator
from clicktrain.data.statistics import EIGHT_BIT, ValueRange
from clicktrain.errors import UserError, shown

SHUFFLE_BUFFER = 4096
"""Samples that are shuffled together unless the settings say otherwise."""
MOST_CLASSES = 10_000_000
Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class Piece(NamedTuple):
    """Neighboring samples of a shard that are read at once."""

    shard: int
    unit: int
    """The row group of a Parquet file; 0 in a tar file."""
    base: int
    """Row at which the row group begins (Parquet), or sample of the index at which the shard begins (tar)."""
    first: int
    """Row of the shard at which the piece begins."""
    rows: int


class Sample(NamedTuple):
    """An encoded image and its class."""

    data: bytes
    label: int


class ShardReader(Protocol):
    """Reads samples of shards; keeps nothing open, so that threads and processes may share it."""

    files: tuple[Path, ...]

    def read(self, piece: Piece, rows: Sequence[int]) -> list[Sample]:
        """Read samples of a piece by their rows in the shard, ascending; UserError names the sample."""

    def labels(self, piece: Piece) -> Ints:
        """Read the classes of a piece's samples, int64 [rows of the piece]."""

    def name(self, piece: Piece, row: int) -> str:
        """Return what a message calls the sample of this row: the shard's path and the sample in it."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of a split, in the order of the shards; samples are numbered through."""

    table: Ints
    """[P, 5], columns as the fields of `Piece`; no piece is empty."""

    @property
    def counts(self) -> Ints:
        """Samples of each piece, [P]."""
        counts: Ints = self.table[:, 4]
        return counts

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Piece:
        return Piece(*self.table[index].tolist())

    @property
    def samples(self) -> int:
        """Samples of all pieces."""
        return int(self.counts.sum())

    def hold_out(self, samples: int, seed: int) -> tuple[Pieces, Pieces]:
        """Split off ``samples`` of them: pieces drawn by ``seed``, and the beginning of one more.

        Returns the rest and what was split off. Whole pieces, so that reading a few samples does not take
        reading all shards.
        """
        order = torch.randperm(len(self), generator=seeded_generator("hold out", seed)).numpy()
        ends = self.counts[order].cumsum()
        whole = int(np.searchsorted(ends, samples, side="right"))
        taken = np.zeros(len(self), dtype=np.int64)  # samples of each piece that are split off
        taken[order[:whole]] = self.counts[order[:whole]]
        if whole < len(self):
            taken[order[whole]] = samples - (int(ends[whole - 1]) if whole else 0)
        held, rest = self.table.copy(), self.table.copy()
        held[:, 4] = taken
        rest[:, 3] += taken
        rest[:, 4] -= taken
        return Pieces(rest[rest[:, 4] > 0]), Pieces(held[held[:, 4] > 0])


@dataclass(frozen=True, eq=False)
class ShardSource:
    """A split whose encoded images stay in shards; only a buffer of them is in memory."""

    reader: ShardReader
    pieces: Pieces
    num_classes: int
    channels: int
    size: tuple[int, int]
    """Height, width of the decoded images."""
    resize: bool
    """Whether images of other sizes are fitted to ``size``; otherwise they are an error."""
    values: ValueRange = EIGHT_BIT
    """Which values become 0 to 255."""
    buffer: int = SHUFFLE_BUFFER
    """Samples that are shuffled together."""

    def __len__(self) -> int:
        return self.pieces.samples

    @property
    def ratio(self) -> float:
        """See `EncodedSource.ratio`."""
        return 256 / 224 if self.resize else 1.0

    def name(self, sample: int) -> str:
        """Return what a message calls a sample, numbered through the split."""
        starts = self.pieces.counts.cumsum() - self.pieces.counts
        at = int(np.searchsorted(starts, sample, side="right")) - 1
        piece = self.pieces[at]
        return self.reader.name(piece, piece.first + sample - int(starts[at]))


class LabelCounts:
    """Counts the images of each class while labels pass, and refuses labels that are none."""

    def __init__(self, num_classes: int | None) -> None:
        self.num_classes = num_classes
        self.counts: Ints = np.zeros(num_classes or 0, dtype=np.int64)
        self.largest = ""
        """Name of a sample of the largest class."""

    def add(self, labels: Ints, name: Callable[[int], str]) -> None:
        """Count int64 [n]; ``name`` says what a message calls the n-th of them.

        Raises:
            UserError: a label below 0, or not below the number of classes; names the sample.
        """
        if not len(labels):
            return
        limit = self.num_classes or MOST_CLASSES
        wrong = np.flatnonzero((labels < 0) | (labels >= limit))
        if len(wrong):
            label = int(labels[wrong[0]])
            meaning = " (-1 stands for an image without a label)" if label == -1 else ""
            raise UserError(
                f"{name(int(wrong[0]))} has label {shown(label)}{meaning}; with "
                f"{'up to ' if self.num_classes is None else ''}{limit:,} classes labels are 0 to {limit - 1}"
            )
        if int(labels.max()) >= len(self.counts):
            self.largest = name(int(labels.argmax()))
        counted = np.bincount(labels, minlength=len(self.counts))
        counted[: len(self.counts)] += self.counts
        self.counts = counted


def class_counts(reader: ShardReader, pieces: Pieces, num_classes: int) -> Tensor:
    """Count the images of each class in some pieces, int64 [num_classes], by reading labels only."""
    counts = LabelCounts(num_classes)
    for index in range(len(pieces)):
        piece = pieces[index]
        counts.add(reader.labels(piece), lambda n, piece=piece: reader.name(piece, piece.first + n))  # type: ignore[misc]
    return torch.from_numpy(counts.counts)
