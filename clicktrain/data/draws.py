"""Random numbers of batches and of their parts, which depend on seed, epoch and batch alone."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor


def seeded_generator(purpose: str, *key: int) -> torch.Generator:
    """Make a CPU generator whose stream is fixed by ``purpose`` and ``key`` alone.

    Streams of different purposes (what the numbers are for, such as ``"mixup"``) or keys (integers, usually
    seed, epoch, batch index) are unrelated, so a batch can be drawn again, or skipped, without replaying the
    ones before it.
    """
    text = ":".join([purpose, *(str(int(part)) for part in key)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)  # manual_seed takes 63 bits
    return generator


@dataclass(frozen=True)
class Part:
    """The images of a batch that one of several processes trains on: a run of them.

    A batch has ``parts`` of almost equal length, whatever the number of processes: a process has whole parts,
    one after another, or shares one part with its neighbors where there are more processes than parts.

    Attributes:
        index: of the process, from 0, below ``count``.
        count: processes that share a batch.
        parts: into which a batch is divided; as many as processes if left out.
    """

    index: int = 0
    count: int = 1
    parts: int | None = None

    @property
    def number(self) -> int:
        """Parts of a batch."""
        return self.parts or self.count

    @property
    def own(self) -> range:
        """The parts that this process has images of: several, or the one that it shares."""
        if self.count > self.number:
            return range(self._shared, self._shared + 1)
        return range(*(_cut(index, self.number, self.count) for index in (self.index, self.index + 1)))

    @property
    def sharers(self) -> range:
        """The processes that have images of this process's part: itself, unless there are more than parts."""
        if self.count <= self.number:
            return range(self.index, self.index + 1)
        first = _cut(self._shared, self.count, self.number)
        return range(first, _cut(self._shared + 1, self.count, self.number))

    @property
    def _shared(self) -> int:
        starts = (_cut(part + 1, self.count, self.number) for part in range(self.number))
        return next(part for part, end in enumerate(starts) if self.index < end)

    def pieces(self, whole: int) -> list[slice]:
        """Where this process's images of ``whole`` lie, of each of its parts."""
        bounds = [(_cut(part, whole, self.number), _cut(part + 1, whole, self.number)) for part in self.own]
        if len(self.sharers) == 1:
            return [slice(*ends) for ends in bounds]
        (first, end), place, number = bounds[0], self.index - self.sharers.start, len(self.sharers)
        return [slice(first + _cut(place, end - first, number), first + _cut(place + 1, end - first, number))]

    def rows(self, whole: int) -> slice:
        """Where all of this process's images of ``whole`` lie."""
        pieces = self.pieces(whole)
        return slice(pieces[0].start, pieces[-1].stop)

    @property
    def streams(self) -> list[int]:
        """Numbers that seed what is drawn for each of the pieces (dropout, mixup)."""
        return list(self.own) if len(self.sharers) == 1 else [self.index]

    def longest(self, whole: int) -> int:
        """The most images of ``whole`` that any process has of one part."""
        every = (Part(index, self.count, self.parts) for index in range(self.count))
        return max(int(piece.stop - piece.start) for one in every for piece in one.pieces(whole))


def _cut(index: int, whole: int, count: int) -> int:
    """Where the ``index``-th of ``count`` runs of ``whole`` begins."""
    return index * whole // count


WHOLE = Part()
"""The whole batch: there is one process."""


@dataclass(frozen=True)
class Draws:
    """Random numbers of the images of a batch, or of a part of it.

    A part gets the numbers that its images have in the whole batch, so that augmentation does not depend on
    how many processes share it.

    Attributes:
        generator: on the CPU, as all of this module: the same draws are made whatever the device.
        whole: images of the batch; None: those that are drawn for.
        rows: where those that are drawn for lie in it.
    """

    generator: torch.Generator
    whole: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))

    def rand(self, *shape: int, dim: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform in [0, 1), of this shape, whose dimension ``dim`` counts images."""
        return self._own(torch.rand(self._shape(shape, dim), generator=self.generator, dtype=dtype), dim)

    def randint(self, high: int, *shape: int, dim: int = 0) -> Tensor:
        """Integers from 0 to ``high - 1``; see `rand`."""
        return self._own(torch.randint(0, high, self._shape(shape, dim), generator=self.generator), dim)

    def randn(self, *shape: int, dim: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed with mean 0 and deviation 1; see `rand`."""
        return self._own(torch.randn(self._shape(shape, dim), generator=self.generator, dtype=dtype), dim)

    def _shape(self, shape: tuple[int, ...], dim: int) -> list[int]:
        sizes = list(shape)
        sizes[dim] = sizes[dim] if self.whole is None else self.whole
        return sizes

    def _own(self, drawn: Tensor, dim: int) -> Tensor:
        return drawn[(slice(None),) * dim + (self.rows,)]
