"""Batches of images that are decoded by worker processes while the network trains."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clicktrain.data.augment import random_boxes
from clicktrain.data.decode import check_size, decode_image, fit, to_pixels
from clicktrain.data.draws import Draws, seeded_generator
from clicktrain.data.image_data import EncodedSource
from clicktrain.data.loader import Batch, BatchPlan, Finish, PlannedLoader
from clicktrain.data.shards.source import ShardSource
from clicktrain.errors import UserError

T = TypeVar("T")

_PREFETCHED = 4  # batches that each worker has ready or in the making


@dataclass(frozen=True)
class Broken:
    """What a worker sends in place of a batch: an exception would arrive as a traceback."""

    message: str


def decoded(
    source: EncodedSource | ShardSource,
    data: bytes,
    name: str,
    index: int,
    crops: tuple[int, int] | None,
    copy: int = 0,
) -> Tensor:
    """Decode an image to the size of its source, uint8 [C, H, W].

    ``crops``: seed and epoch of a random resized crop of image ``index``, or None for the image's center;
    each ``copy`` of the image in the epoch has another.

    Raises:
        UserError: broken, or of another size than a source that does not resize; names the image.
    """
    image = decode_image(data, name, source.channels, source.values)
    if not source.resize:
        check_size(image, source.size, name)
    if crops is None:
        return to_pixels(fit(image, source.size, source.ratio))
    key = (index, copy) if copy else (index,)
    draws = Draws(seeded_generator("resized crop", *crops, *key))
    top, left, height, width = random_boxes(1, image.height, image.width, draws)[0].tolist()
    box = (left, top, left + width, top + height)
    size = (source.size[1], source.size[0])
    return to_pixels(image.resize(size, Image.Resampling.BILINEAR, box=box))


class _DecodedBatches(Dataset["Tensor | Broken"]):
    """Item (epoch, [(index, copy), ...]) is the batch of these images, uint8 [B, C, H, W]."""

    def __init__(self, source: EncodedSource, resized_crop: bool, seed: int) -> None:
        self._source, self._resized_crop, self._seed = source, resized_crop, seed

    def __getitem__(self, item: tuple[int, list[tuple[int, int]]]) -> Tensor | Broken:
        epoch, places = item
        images, crops = self._source.images, (self._seed, epoch) if self._resized_crop else None
        try:
            return torch.stack(
                [
                    decoded(self._source, images.read(at), images.name(at), at, crops, copy)
                    for at, copy in places
                ]
            )
        except UserError as error:
            return Broken(str(error))


def _outlive_signals(worker: int) -> None:
    """Let a worker outlive a signal that goes to a whole group, as a terminal or a launcher sends it.

    The training process decides when it stops, and needs its workers until then. A second SIGTERM ends them,
    so that Python can.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # there is no SIGHUP on Windows
            signal.signal(getattr(signal, name), _end_next_time)


def _end_next_time(signum: int, frame: FrameType | None) -> None:
    del frame
    signal.signal(signum, signal.SIG_DFL)


def by_workers(dataset: Dataset[T], items: Iterable[Any], workers: int, device: torch.device) -> Iterator[T]:
    """Let worker processes (0: this one) make ``dataset[item]`` of each item, ahead and in order."""
    with warnings.catch_warnings():
        # how many workers is the user's choice: more than cores may suit a slow disk
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader[T] = DataLoader(
            dataset,
            batch_size=None,  # the items are batches
            sampler=items,
            num_workers=workers,
            prefetch_factor=_PREFETCHED if workers else None,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the default would advance the global one
            worker_init_fn=_outlive_signals,
        )
        return iter(loader)


class StreamingLoader(PlannedLoader):
    """Decodes in ``workers`` processes (0: in this one) ahead of the training step.

    Workers decode, and for training crop at random and resize; the rest of the augmentation is done on the
    device for the whole batch.
    """

    def __init__(
        self, source: EncodedSource, plan: BatchPlan, finish: Finish, device: torch.device, workers: int
    ) -> None:
        self._dataset = _DecodedBatches(source, finish.augment.resized_crop, finish.seed)
        super().__init__(plan, replace(finish, augment=replace(finish.augment, resized_crop=False)), device)
        self._labels, self._workers = source.labels, workers

    def _batches(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        order = self._plan.order(epoch)
        copies = self._plan.copies() if self._plan.repeats > 1 else torch.zeros_like(order)
        flips = self._finish.mirrored(self._plan, order, epoch)
        batches = self._plan.batches(start_batch)
        pending = [self._plan.rows(batch) for batch in batches]
        if not pending:
            return
        items = [
            (epoch, list(zip(order[rows].tolist(), copies[rows].tolist(), strict=True))) for rows in pending
        ]
        ready = by_workers(self._dataset, items, self._workers, self._device)
        for batch, rows, images in zip(batches, pending, ready, strict=True):
            if isinstance(images, Broken):
                raise UserError(images.message)
            images = images.to(self._device, non_blocking=True)
            labels = self._labels[order[rows]].to(self._device, non_blocking=True)
            mirrored = None if flips is None else flips[rows]
            yield Batch(self._finish(images, epoch, batch, self._plan, mirrored), labels)
