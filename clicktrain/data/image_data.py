"""A data set that is ready to be trained on: pixels in memory, or files that are decoded on the fly."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from clicktrain.data.listing import EncodedImages
from clicktrain.data.shards.source import ShardSource
from clicktrain.data.statistics import EIGHT_BIT, ValueRange


@dataclass(frozen=True, eq=False)
class PixelSource:
    """Images in memory: uint8 [N, C, H, W] and int64 labels [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class EncodedSource:
    """Image files that are decoded by workers each time they are used; int64 labels [N]."""

    images: EncodedImages
    labels: Tensor
    channels: int
    size: tuple[int, int]
    """Height, width of the decoded images."""
    resize: bool
    """Whether images of other sizes are fitted to ``size``; otherwise they are an error."""
    values: ValueRange = EIGHT_BIT
    """Which values become 0 to 255."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ratio(self) -> float:
        """How much larger than ``size`` an image is made before its center is kept (ImageNet: 256/224)."""
        return 256 / 224 if self.resize else 1.0


Source = PixelSource | EncodedSource | ShardSource


@dataclass(frozen=True)
class ImageData:
    """An opened data set: what a trainer has to know of it, and its two splits."""

    spec: str
    """The specification that was opened."""
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """C, H, W."""
    mean: tuple[float, ...]
    """Per channel, of training pixels in [0, 1]."""
    std: tuple[float, ...]
    train: Source
    val: Source
    workers: int = 2
    """Processes that decode where the images are not in memory."""
    value_range: tuple[float, float] | None = None
    """The values of images deeper than 8 bits that became 0 and 255."""
    test: Source | None = None
    """The data set's own validation or test split, where ``val`` was held out of the training images."""

    @property
    def in_memory(self) -> bool:
        """Whether the images are decoded already."""
        return isinstance(self.train, PixelSource)

    def describe(self) -> str:
        """Say in one line what this data set is."""
        channels, height, width = self.image_shape
        color = {1: "gray", 3: "RGB"}.get(channels, f"{channels}-channel")
        others = 0 if self.test is None else len(self.test)
        tested = f" and {others:,} test" if others else ""
        if self.in_memory:
            mebibytes = (len(self.train) + len(self.val) + others) * math.prod(self.image_shape) / 2**20
            where = f"in memory ({mebibytes:,.1f} MiB)"
        else:
            where = f"decoded by {self.workers} workers"
        if isinstance(self.train, ShardSource):
            shards = len(self.train.reader.files)
            where = f"streamed from {shards:,} shard{'s' * (shards != 1)}, {where}"
        if self.value_range is not None:
            low, high = self.value_range
            where += f", pixel values {low:g} to {high:g} scaled to 0 to 255"
        return (
            f"{self.spec}: {len(self.train):,} training and {len(self.val):,} validation{tested} images, "
            f"{len(self.classes)} classes, {height}x{width} {color}, {where}"
        )
