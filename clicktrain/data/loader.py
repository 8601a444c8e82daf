"""Batches of a data set, in an order and with an augmentation that depend on seed, epoch and batch alone."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from clicktrain.data.augment import Augment, augment_and_normalize, mirrored_in_epoch
from clicktrain.data.draws import WHOLE, Draws, Part, seeded_generator
from clicktrain.data.image_data import PixelSource


class Batch(NamedTuple):
    """One step's images and labels, on the training device."""

    x: Tensor
    """Float [B, C, H, W], normalized."""
    y: Tensor
    """int64 [B]."""

    def cut(self, rows: slice) -> Batch:
        """Return some of the images, with their labels."""
        return Batch(self.x[rows], self.y[rows])


@dataclass(frozen=True)
class BatchPlan:
    """Which images make which batch, and which of them are this process's.

    In training every process has a part of each batch; else every process has batches of its own, in turns.

    With ``repeats`` each image of an epoch is in it that many times, in one batch as a rule (Hoffer et al.
    2020; Berman et al. 2019), and the epoch has as many batches as without: it goes through a
    part of the images. Copies lie apart in the batch, so that several processes have different ones.
    """

    num_images: int
    batch_size: int
    drop_last: bool
    shuffle: bool
    seed: int
    part: Part = WHOLE
    repeats: int = 1

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        whole, rest = divmod(self.num_images, self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def resized(self, batch_size: int) -> BatchPlan:
        """Return the plan for batches of another size, of which at least one is full."""
        if not 1 <= batch_size <= self.num_images:
            raise ValueError(f"{self.num_images} images make no batch of {batch_size}")
        return replace(self, batch_size=batch_size)

    def order(self, epoch: int) -> Tensor:
        """Return the order of the images, int64 [num_images]; batch b is its b-th run of ``batch_size``."""
        if not self.shuffle:
            return torch.arange(self.num_images)
        order = torch.randperm(self.num_images, generator=seeded_generator("order", self.seed, epoch))
        return order if self.repeats == 1 else order[self._places() // self.repeats]

    def copies(self) -> Tensor:
        """Return which of the copies of its image each place of the order has, int64 [num_images], from 0."""
        return self._places() % self.repeats

    def _places(self) -> Tensor:
        """Places in the order with all copies of an image side by side, before each batch is spread out."""
        batches = torch.split(torch.arange(self.num_images), self.batch_size)
        return torch.cat([batch[first :: self.repeats] for batch in batches for first in range(self.repeats)])

    def images(self, batch: int) -> int:
        """Return the number of images of a batch, of all processes."""
        return min(self.batch_size, self.num_images - batch * self.batch_size)

    def own(self, batch: int) -> slice:
        """Return which images of a batch are this process's."""
        return self.part.rows(self.images(batch)) if self.shuffle else slice(0, self.images(batch))

    def rows(self, batch: int) -> slice:
        """Return where this process's images of batch ``batch`` lie in the order."""
        first, own = batch * self.batch_size, self.own(batch)
        return slice(first + own.start, first + own.stop)

    def batches(self, start_batch: int) -> range:
        """Return the batches of an epoch that this process has images of, from a batch on."""
        if self.shuffle:
            return range(start_batch, len(self))
        first = start_batch + (self.part.index - start_batch) % self.part.count
        return range(first, len(self), self.part.count)

    def owned(self, positions: Tensor, start_batch: int) -> Tensor:
        """Return which positions of the order are this process's, from a batch on; bool, as ``positions``."""
        batch = positions // self.batch_size
        wanted = (batch >= start_batch) & (batch < len(self))
        if not self.shuffle:
            return wanted & (batch % self.part.count == self.part.index)
        last = len(self) - 1
        full, rest = self.own(0), self.own(last)  # the last batch may be smaller
        within = positions - batch * self.batch_size
        low = torch.where(batch == last, rest.start, full.start)
        high = torch.where(batch == last, rest.stop, full.stop)
        return wanted & (within >= low) & (within < high)

    def check_start(self, start_batch: int) -> None:
        """Raise a `ValueError` unless an epoch can start at this batch."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch={start_batch} is outside of the epoch's {len(self)} batches")


@dataclass(frozen=True, eq=False)
class Finish:
    """What is done to a batch on its device: augmentation, normalization, memory layout."""

    augment: Augment
    mean: Tensor
    std: Tensor
    seed: int
    dtype: torch.dtype
    channels_last: bool

    def mirrored(self, plan: BatchPlan, order: Tensor, epoch: int) -> Tensor | None:
        """Which images of an epoch's order are mirrored, bool, where that alternates; found once an epoch.

        Copies of an image take turns.
        """
        if not self.augment.alternating:
            return None
        flips = mirrored_in_epoch(plan.num_images, self.seed, epoch)[order.cpu()]
        return flips if plan.repeats == 1 else flips ^ (plan.copies() % 2).bool()

    def __call__(
        self, images: Tensor, epoch: int, batch: int, plan: BatchPlan, mirrored: Tensor | None = None
    ) -> Tensor:
        """Turn uint8 [B, C, H, W] into the network's input; ``mirrored``: bool [B], see `mirrored`."""
        generator = seeded_generator("augment", self.seed, epoch, batch)
        draws = Draws(generator, plan.images(batch), plan.own(batch))
        x = augment_and_normalize(images, self.augment, self.mean, self.std, draws, mirrored)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.to(self.dtype, memory_format=layout)


class Loader(ABC):
    """Gives the batches of an epoch, from any batch on."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches of an epoch."""

    @abstractmethod
    def with_batch_size(self, batch_size: int) -> Loader:
        """Return a loader of the same images, in the same order, in batches of another size."""

    @abstractmethod
    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch; another number gives another order and augmentation.

        One of several processes gets its part of them: of training images a part of each batch, of others
        whole batches, in turns. Batches before ``start_batch`` are not loaded; the rest is what an epoch from
        the beginning yields.
        """


class PlannedLoader(Loader):
    """Batches by a `BatchPlan`; a subclass yields them."""

    def __init__(self, plan: BatchPlan, finish: Finish, device: torch.device) -> None:
        self._plan, self._finish, self._device = plan, finish, device

    def __len__(self) -> int:
        return len(self._plan)

    def with_batch_size(self, batch_size: int) -> PlannedLoader:
        """Return a loader of other batches, see `Loader.with_batch_size`, that shares the images."""
        other = copy.copy(self)
        other._plan = self._plan.resized(batch_size)
        return other

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch: see `Loader.epoch`."""
        self._plan.check_start(start_batch)
        return self._batches(epoch, start_batch)

    @abstractmethod
    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch from a valid one on."""


class InMemoryLoader(PlannedLoader):
    """Batches of uint8 images in the memory of the training device."""

    def __init__(self, source: PixelSource, plan: BatchPlan, finish: Finish, device: torch.device) -> None:
        super().__init__(plan, finish, device)
        self._images, self._labels = source.images.to(device), source.labels.to(device)

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        order = self._plan.order(epoch).to(self._device)
        flips = self._finish.mirrored(self._plan, order, epoch)
        for batch in self._plan.batches(start_batch):
            rows = self._plan.rows(batch)
            indices = order[rows]
            images = self._images.index_select(0, indices)
            mirrored = None if flips is None else flips[rows]
            x = self._finish(images, epoch, batch, self._plan, mirrored)
            yield Batch(x, self._labels.index_select(0, indices))
