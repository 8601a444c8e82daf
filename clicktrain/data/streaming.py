"""Batches of images that are decoded by worker processes while the network trains."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clicktrain.data.augment import WHOLE, Augment, Draws, Part, random_boxes, seeded_generator
from clicktrain.data.decode import check_size, decode_image, fit, to_pixels
from clicktrain.data.image_data import EncodedSource, ImageData, PixelSource
from clicktrain.data.loader import Batch, BatchPlan, Finish, InMemoryLoader, Loader, PlannedLoader
from clicktrain.errors import UserError

_PREFETCHED = 4  # batches that each worker has ready or in the making


@dataclass(frozen=True)
class _Broken:
    """What a worker sends in place of a batch: an exception would arrive as a traceback."""

    message: str


class _DecodedBatches(Dataset["Tensor | _Broken"]):
    """Item (epoch, [(index, copy), ...]) is the batch of these images, uint8 [B, C, H, W]."""

    def __init__(self, source: EncodedSource, resized_crop: bool, seed: int) -> None:
        self._source, self._resized_crop, self._seed = source, resized_crop, seed

    def __getitem__(self, item: tuple[int, list[tuple[int, int]]]) -> Tensor | _Broken:
        epoch, images = item
        try:
            return torch.stack([to_pixels(self._decode(epoch, index, copy)) for index, copy in images])
        except UserError as error:
            return _Broken(str(error))

    def _decode(self, epoch: int, index: int, copy: int) -> Image.Image:
        source = self._source
        name = source.images.name(index)
        image = decode_image(source.images.read(index), name, source.channels, source.values)
        if not source.resize:
            check_size(image, source.size, name)
        if not self._resized_crop:
            return fit(image, source.size, source.ratio)
        key = (index, copy) if copy else (index,)
        draws = Draws(seeded_generator("resized crop", self._seed, epoch, *key))
        top, left, height, width = random_boxes(1, image.height, image.width, draws)[0].tolist()
        box = (left, top, left + width, top + height)
        return image.resize((source.size[1], source.size[0]), Image.Resampling.BILINEAR, box=box)


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
        with warnings.catch_warnings():
            # how many workers is the user's choice: more than cores may suit a slow disk
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            decoded: DataLoader[Tensor | _Broken] = DataLoader(
                self._dataset,
                batch_size=None,  # the items are batches
                sampler=[
                    (epoch, list(zip(order[rows].tolist(), copies[rows].tolist(), strict=True)))
                    for rows in pending
                ],
                num_workers=self._workers,
                prefetch_factor=_PREFETCHED if self._workers else None,
                pin_memory=self._device.type == "cuda",
                generator=torch.Generator(),  # the default would advance the global one
            )
            ready = iter(decoded)
        for batch, rows, images in zip(batches, pending, ready, strict=True):
            if isinstance(images, _Broken):
                raise UserError(images.message)
            images = images.to(self._device, non_blocking=True)
            labels = self._labels[order[rows]].to(self._device, non_blocking=True)
            mirrored = None if flips is None else flips[rows]
            yield Batch(self._finish(images, epoch, batch, self._plan, mirrored), labels)


def make_loader(
    data: ImageData,
    split: Literal["train", "val", "test"],
    *,
    batch_size: int,
    device: torch.device,
    seed: int,
    augment: Augment,
    drop_last: bool,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float32,
    part: Part = WHOLE,
    repeats: int = 1,
) -> Loader:
    """Make the loader of a split.

    Training images are shuffled and augmented; other images come in their order and as they are,
    whatever ``augment`` says.

    Args:
        device: where the batches are to be; images that fit in memory are moved there as a whole.
        seed: of order and augmentation.
        drop_last: leave out a last batch that is not full.
        dtype: of the images in a batch; they are augmented and normalized in float32 all the same.
        part: of the batches, for one of several processes; ``batch_size`` is that of all of them.
        repeats: how often each training image of an epoch is in it, see `BatchPlan`.

    Raises:
        UserError: a batch size that gives no batch, or an augmentation too large for the images.
    """
    source = {"train": data.train, "val": data.val, "test": data.test}[split]
    if source is None:
        raise UserError(f"data {data.spec} has no {split} split")
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} is not possible; 1 or more is")
    if drop_last and batch_size > len(source):
        raise UserError(
            f"batch_size={batch_size} is more than the {len(source)} images of the {split} split of "
            f"{data.spec}; at most {len(source)} gives a full batch"
        )
    training = split == "train"
    smallest = min(batch_size, len(source))
    if training and smallest % part.count:
        raise UserError(
            f"{part.count} processes cannot share batches of {smallest} images evenly: give a batch_size "
            f"that is a multiple of {part.count}"
        )
    applied = augment if training else Augment()
    applied.check(*data.image_shape[1:])
    plan = BatchPlan(len(source), batch_size, drop_last, training, seed, part, repeats if training else 1)
    mean = torch.tensor(data.mean, dtype=torch.float32, device=device)
    std = torch.tensor(data.std, dtype=torch.float32, device=device)
    finish = Finish(applied, mean, std, seed, dtype, channels_last)
    if isinstance(source, PixelSource):
        return InMemoryLoader(source, plan, finish, device)
    return StreamingLoader(source, plan, finish, device, data.workers)
