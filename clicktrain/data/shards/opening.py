"""Opening a data set in shards: index, first look at some images, mean and deviation, held-out part."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clicktrain.data.cache import PixelCache, content_key
from clicktrain.data.decode import check_depths, decode_all, measure_values, mixed_sizes
from clicktrain.data.image_files import read_header
from clicktrain.data.shards.index import IndexedSplit, index_shards
from clicktrain.data.shards.source import SHUFFLE_BUFFER, Piece, ShardReader, ShardSource, class_counts
from clicktrain.data.statistics import (
    EIGHT_BIT,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ValueRange,
    channel_sums,
    mean_and_std,
)
from clicktrain.errors import UserError
from clicktrain.limits import check_memory

_PROBED = (8, 128)  # pieces, and headers in all, that are looked at to learn size and color
_MEASURED = (32, 4096)  # pieces, and images in all, that are decoded to learn mean and std
logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class OpenedShards:
    """What `clicktrain.data.ImageData` has to know."""

    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: ShardSource
    val: ShardSource
    test: ShardSource | None
    value_range: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class ShardRequest:
    """How a data set in shards is to be opened: see `clicktrain.data.open_data`."""

    kind: str
    argument: str
    image_size: int | None
    val_fraction: float
    holdout: int | None
    seed: int
    workers: int
    value_range: tuple[float, float] | None
    buffer: int | None

    @property
    def spec(self) -> str:
        """The specification."""
        return f"{self.kind}:{self.argument}"


def open_shards(request: ShardRequest, folder: Path) -> OpenedShards:
    """Open a data set in shards; ``folder`` keeps its index and statistics.

    Samples that are held out are those of whole pieces, drawn by the seed: of each class about the same share
    where shards are shuffled, as usual.

    Raises:
        UserError: see `index_shards`; images of several sizes without ``image_size``; too many held out.
    """
    cache = PixelCache(folder)
    index = index_shards(request.kind, request.argument, cache)
    splits = [index.train] if index.val is None else [index.train, index.val]
    channels, size, deep, mean_bytes = _probe(splits, request.image_size)
    buffer = SHUFFLE_BUFFER if request.buffer is None else request.buffer
    check_memory(
        mean_bytes * min(buffer, index.train.pieces.samples),
        f"a buffer of {buffer:,} images of {request.spec}",
        "lower shuffle_buffer",
    )
    key = f"{index.key}-{content_key(request.image_size, request.value_range)}"
    look = _Look(request, index.train, cache, key)
    values = look.values() if deep else EIGHT_BIT

    def source(split: IndexedSplit) -> ShardSource:
        resize = request.image_size is not None
        return ShardSource(
            split.reader, split.pieces, len(index.classes), channels, size, resize, values, buffer
        )

    imagenet = len(index.classes) == 1000 and channels == 3
    mean, std = (
        (IMAGENET_MEAN, IMAGENET_STD)
        if imagenet
        else mean_and_std(look.sums(source(index.train)), size[0] * size[1])
    )
    train, val, test = index.train, index.val, None
    if val is None or request.holdout is not None:
        test = val
        train, val = _hold_out(train, request)
    return OpenedShards(
        index.classes, (channels, *size), mean, std, source(train), source(val),
        None if test is None else source(test), (values.low, values.high) if deep else None,
    )  # fmt: skip


def _hold_out(train: IndexedSplit, request: ShardRequest) -> tuple[IndexedSplit, IndexedSplit]:
    """Split off the samples that validate."""
    images = train.pieces.samples
    wanted = request.holdout
    if wanted is None:
        wanted = min(max(round(images * request.val_fraction), 1), images - 1)
    if not 0 < wanted < images:
        raise UserError(
            f"holdout={wanted} is not possible: {request.spec} has {images:,} training images, of which some "
            "have to be left for training"
        )
    rest, held = train.pieces.hold_out(wanted, request.seed)
    held_counts = class_counts(train.reader, held, len(train.class_counts))
    rest_counts = train.class_counts - held_counts
    if int((rest_counts > 0).sum()) < 2:
        raise UserError(
            f"holding out {wanted:,} of the {images:,} training images of {request.spec} leaves images of "
            "less than two classes: hold out fewer, or shuffle the images among the shards"
        )
    untrained = int(((held_counts > 0) & (rest_counts <= 0)).sum())
    if untrained:
        logger.warning(
            "%s: all training images of %d classes are among the %s held out: hold out fewer, or shuffle the "
            "images among the shards", request.spec, untrained, f"{wanted:,}",
        )  # fmt: skip
    return (
        IndexedSplit(train.reader, rest, rest_counts),
        IndexedSplit(train.reader, held, held_counts),
    )


class _Images:
    """Some samples in memory, as the functions that decode images take them."""

    def __init__(self, reader: ShardReader, piece: Piece, rows: list[int]) -> None:
        self._data = [sample.data for sample in reader.read(piece, rows)]
        self._reader, self._piece, self._rows = reader, piece, rows

    def __len__(self) -> int:
        return len(self._data)

    def read(self, index: int) -> bytes:
        """Return the bytes of one image file."""
        return self._data[index]

    def name(self, index: int) -> str:
        """Return the shard and the sample."""
        return self._reader.name(self._piece, self._rows[index])


def _sample(split: IndexedSplit, wanted: tuple[int, int]) -> Iterator[_Images]:
    """Yield samples piece by piece, evenly spread; ``wanted``: pieces, and samples of all of them."""
    pieces = _spread(len(split.pieces), wanted[0])
    for index in pieces:
        piece = split.pieces[index]
        rows = _spread(piece.rows, -(-wanted[1] // len(pieces)))
        yield _Images(split.reader, piece, [piece.first + row for row in rows])


def _spread(count: int, wanted: int) -> list[int]:
    wanted = min(count, wanted)
    return [index * count // wanted for index in range(wanted)]


def _probe(splits: list[IndexedSplit], image_size: int | None) -> tuple[int, tuple[int, int], bool, float]:
    """Learn from some images: channels, size, whether values have more than 8 bits, bytes of a file."""
    gray = True
    sizes: list[int] = []
    first: tuple[str, tuple[int, int]] | None = None
    deep: dict[bool, str] = {}
    for images in itertools.chain.from_iterable(_sample(split, _PROBED) for split in splits):
        for index in range(len(images)):
            name = images.name(index)
            header = read_header(images.read(index), name)
            sizes.append(len(images.read(index)))
            gray = gray and header.gray
            first = first or (name, header.size)
            deep.setdefault(header.deep, name)
            if image_size is None and header.size != first[1]:
                raise mixed_sizes(name, header.size, first[0], first[1])
    assert first is not None  # an index that passed its check is not empty
    check_depths(deep)
    size = first[1] if image_size is None else (image_size, image_size)
    return (1 if gray else 3), size, True in deep, sum(sizes) / len(sizes)


@dataclass(frozen=True, eq=False)
class _Look:
    """What is measured on a sample of the training images, or known from the cache."""

    request: ShardRequest
    train: IndexedSplit
    cache: PixelCache
    key: str

    def values(self) -> ValueRange:
        """The range that the user gave, or that of a sample; values outside are clipped."""
        if self.request.value_range is not None:
            return ValueRange(*self.request.value_range)
        low, high = self._cached("range", "value_range", self._measure_range).tolist()
        return ValueRange(low, high)

    def sums(self, source: ShardSource) -> Tensor:
        """`channel_sums` of a sample."""
        return self._cached("sample", "train_sums", lambda: self._measure_sums(source))

    def _measure_range(self) -> Tensor:
        values: ValueRange | None = None
        logger.info("measuring the range of the pixel values of %s, once", self.request.spec)
        for images in _sample(self.train, _MEASURED):
            values = measure_values(images, list(range(len(images))), self.request.workers).including(values)
        assert values is not None
        return values.tensor()

    def _measure_sums(self, source: ShardSource) -> Tensor:
        logger.info("decoding some images of %s to measure mean and std, once", self.request.spec)
        sums = []
        for images in _sample(self.train, _MEASURED):
            pixels = decode_all(
                images, list(range(len(images))), source.channels, source.size, resize=source.resize,
                ratio=source.ratio, threads=self.request.workers, values=source.values,
            )  # fmt: skip
            sums.append(channel_sums(pixels))
        return torch.cat(sums)

    def _cached(self, part: str, name: str, measure: Callable[[], Tensor]) -> Tensor:
        key = f"{self.key}-{part}"
        cached = self.cache.load(key)
        if cached is not None and name in cached:
            return cached[name]
        tensor = measure()
        self.cache.store(key, {name: tensor})
        return tensor
