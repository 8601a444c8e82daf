"""Making the loader of a split, whatever holds its images."""

from __future__ import annotations

from typing import Literal

import torch

from clicktrain.data.augment import Augment
from clicktrain.data.draws import WHOLE, Part
from clicktrain.data.image_data import ImageData, PixelSource
from clicktrain.data.loader import BatchPlan, Finish, InMemoryLoader, Loader
from clicktrain.data.shards.loader import ShardLoader
from clicktrain.data.shards.source import ShardSource
from clicktrain.data.streaming import StreamingLoader
from clicktrain.errors import UserError


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
        UserError: a batch size that gives no batch, an augmentation too large for the images, or repeated
            images in a stream.
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
    if training and smallest < max(part.count, part.number):
        who = f"{part.count} processes" if part.count >= part.number else f"{part.number} parts"
        raise UserError(
            f"{who} cannot share batches of {smallest} images: give a batch_size of at least "
            f"{max(part.count, part.number)}"
        )
    applied = augment if training else Augment()
    applied.check(*data.image_shape[1:])
    if training and repeats > 1 and isinstance(source, ShardSource):
        raise UserError(
            f"augment_repeats is {repeats} but {data.spec} is a stream, in which each image comes once an "
            "epoch: set it to 1"
        )
    plan = BatchPlan(len(source), batch_size, drop_last, training, seed, part, repeats if training else 1)
    mean = torch.tensor(data.mean, dtype=torch.float32, device=device)
    std = torch.tensor(data.std, dtype=torch.float32, device=device)
    finish = Finish(applied, mean, std, seed, dtype, channels_last)
    if isinstance(source, PixelSource):
        return InMemoryLoader(source, plan, finish, device)
    if isinstance(source, ShardSource):
        return ShardLoader(source, plan, finish, device, data.workers)
    return StreamingLoader(source, plan, finish, device, data.workers)
