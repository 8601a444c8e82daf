"""Opening a data set by its specification: list, check, decode or stream, split, measure."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clicktrain.data.cache import PixelCache, content_key, default_cache_dir, require_space
from clicktrain.data.decode import check_depths, decode_all, fit, measure_values, mixed_sizes, to_pixels
from clicktrain.data.image_data import EncodedSource, ImageData, PixelSource
from clicktrain.data.image_files import read_header
from clicktrain.data.listing import EncodedImages, ListedSplit, Listing, SubsetImages, stratified_split
from clicktrain.data.shards.index import SHARD_KINDS
from clicktrain.data.shards.opening import ShardRequest, open_shards
from clicktrain.data.sources.cifar import list_cifar
from clicktrain.data.sources.embedded import list_digits, list_synthetic
from clicktrain.data.sources.image_folder import list_image_folder
from clicktrain.data.spec import DataSpec
from clicktrain.data.statistics import (
    EIGHT_BIT,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ValueRange,
    channel_sums,
    mean_and_std,
)
from clicktrain.errors import UserError, shortened, shown
from clicktrain.limits import in_words

MEMORY_LIMIT = 2 * 2**30
"""Decoded bytes up to which a data set is kept in memory."""
LARGEST_SIDE = 8192
"""Pixels that images may be resized to."""
_PROBED = 128  # headers looked at to learn size and color
_MEASURED = 4096  # images decoded to learn mean and std of a set that does not fit
logger = logging.getLogger(__name__)


def open_data(
    spec: str,
    *,
    image_size: int | None = None,
    val_fraction: float = 0.2,
    holdout: int | None = None,
    seed: int = 0,
    cache_dir: Path | None = None,
    workers: int = 2,
    memory_limit: int = MEMORY_LIMIT,
    value_range: tuple[float, float] | None = None,
    shuffle_buffer: int | None = None,
) -> ImageData:
    """Open a data set.

    Images that take at most ``memory_limit`` when decoded are decoded at once, in threads, and kept as uint8
    tensors, also in the cache for the next start; other data sets are decoded while training.

    Args:
        spec: one of `clicktrain.data.spec.FORMS`.
        image_size: side in pixels; images of other sizes are resized to cover the square and their center is
            kept. None keeps the size that all images have.
        val_fraction: share of each class that is held out, only where the data set has no validation split.
        holdout: take that many training images for validation; the data set's validation split, if it has
            one, is then `ImageData.test`.
        seed: of these draws alone.
        cache_dir: folder for decoded images; None is the platform's.
        workers: decoding threads now, and decoding processes in a loader of a set that does not fit.
        value_range: of images deeper than 8 bits, the values that become 0 and 255: that of the data that a
            network was trained on. None measures it: over all images, or over a sample of those that are
            decoded while training. Without effect on 8-bit images.
        shuffle_buffer: images that are shuffled together, of a data set in shards (None: 4,096); an error
            with others, which are shuffled as a whole.

    Raises:
        UserError: the arguments or the data are wrong; one sentence says what.
    """
    _check_arguments(image_size, val_fraction, workers)
    folder = cache_dir if cache_dir is not None else default_cache_dir()
    parsed = DataSpec.parse(spec)
    if parsed.kind in SHARD_KINDS:
        request = ShardRequest(
            kind=parsed.kind, argument=parsed.argument, image_size=image_size, val_fraction=val_fraction,
            holdout=holdout, seed=seed, workers=workers, value_range=value_range, buffer=shuffle_buffer,
        )  # fmt: skip
        return _from_shards(spec, request, folder)
    if shuffle_buffer is not None:
        raise UserError(
            f"shuffle_buffer is for data in shards ({', '.join(SHARD_KINDS)}): leave it out, "
            f"{shown(spec, 150)} is shuffled as a whole"
        )
    try:
        listing = _list(parsed, folder, cache_dir, memory_limit)
    except OSError as error:
        raise _unreadable(spec, error) from error
    classes = listing.check(spec)
    if isinstance(listing.train.images, Tensor):
        loaded = _from_pixels(listing, image_size, memory_limit)
    else:
        key = listing.fingerprint and content_key(listing.fingerprint(), image_size, value_range)
        files = _Files(
            spec, listing, image_size, memory_limit, workers, value_range, PixelCache(folder),
            key and f"{parsed.kind}-{key}",
        )  # fmt: skip
        loaded = files.load(imagenet=len(classes) == 1000)
    train, val, test, train_sums = loaded.train, loaded.val, None, loaded.train_sums
    if val is None or holdout is not None:
        if holdout is not None:
            val_fraction = _share(holdout, len(train), spec)
        kept, held_out = stratified_split(train.labels, val_fraction, seed, spec)
        test = val
        train, val = _subset(train, kept), _subset(train, held_out)
        if isinstance(train, PixelSource) and train_sums is not None:
            train_sums = train_sums[kept]
    height, width = loaded.shape[1:]
    mean, std = (
        (IMAGENET_MEAN, IMAGENET_STD) if train_sums is None else mean_and_std(train_sums, height * width)
    )
    data = ImageData(spec, classes, loaded.shape, mean, std, train, val, workers, loaded.value_range, test)
    logger.info("%s", data.describe())
    return data


def _from_shards(spec: str, request: ShardRequest, folder: Path) -> ImageData:
    """Open a data set that is streamed."""
    try:
        opened = open_shards(request, folder)
    except OSError as error:
        raise _unreadable(spec, error) from error
    data = ImageData(
        spec, opened.classes, opened.shape, opened.mean, opened.std, opened.train, opened.val,
        request.workers, opened.value_range, opened.test,
    )  # fmt: skip
    logger.info("%s", data.describe())
    return data


def _unreadable(spec: str, error: OSError) -> UserError:
    """The error for a folder without permission, a disk that fails."""
    reason = shortened(str(error), 200)
    return UserError(f"data {shown(spec, 150)} cannot be read ({reason}); check the folder's permissions")


def _share(holdout: int, images: int, spec: str) -> float:
    """The share of the training images that ``holdout`` is."""
    if not 0 < holdout < images:
        raise UserError(
            f"holdout={holdout} is not possible: {spec} has {images:,} training images, of which some have "
            "to be left for training"
        )
    return holdout / images


def _check_arguments(image_size: int | None, val_fraction: float, workers: int) -> None:
    if image_size is not None and not 1 <= image_size <= LARGEST_SIDE:
        raise UserError(
            f"image_size={shown(image_size)} is not possible; a number of pixels from 1 to {LARGEST_SIDE} is"
        )
    if not 0 < val_fraction < 1:
        raise UserError(
            f"val_fraction={val_fraction} is not possible; a share above 0 and below 1 is, such as 0.2"
        )
    if workers < 0:
        raise UserError(f"workers={workers} is not possible; 0 (decode in the training process) or more is")


def _list(spec: DataSpec, folder: Path, cache_dir: Path | None, memory_limit: int) -> Listing:
    """List the images; sources with a library of their own are imported here."""
    match spec.kind:
        case "digits":
            return list_digits()
        case "synthetic":
            return list_synthetic(spec.argument, memory_limit)
        case "imagefolder":
            return list_image_folder(spec.argument)
        case "parquet":
            from clicktrain.data.sources.parquet import list_parquet

            return list_parquet(spec.argument, folder, memory_limit)
        case "hub":
            from clicktrain.data.sources.hub import list_hub

            return list_hub(spec.argument, spec.config, cache_dir)
        case _:
            return list_cifar(spec.kind, spec.argument)


@dataclass(frozen=True, eq=False)
class _Loaded:
    """The splits of the source; ``train_sums`` is None where ImageNet's statistics are used."""

    shape: tuple[int, int, int]
    train: PixelSource | EncodedSource
    val: PixelSource | EncodedSource | None
    train_sums: Tensor | None
    value_range: tuple[float, float] | None = None


def _from_pixels(listing: Listing, image_size: int | None, memory_limit: int) -> _Loaded:
    """Use the pixels that the source holds, resized where asked, within the memory limit."""

    def source(split: ListedSplit) -> PixelSource:
        assert isinstance(split.images, Tensor)
        images = split.images
        if image_size is not None and images.shape[2:] != (image_size, image_size):
            needed = images.shape[0] * images.shape[1] * image_size**2
            if needed > memory_limit:
                raise UserError(
                    f"{len(images):,} images of {image_size}x{image_size} pixels take {in_words(needed)} and "
                    f"may take {in_words(memory_limit)}; make image_size smaller"
                )
            images = _resized(images, image_size)
        return PixelSource(images, split.labels)

    train = source(listing.train)
    channels, height, width = train.images.shape[1:]
    val = None if listing.val is None else source(listing.val)
    return _Loaded((channels, height, width), train, val, channel_sums(train.images))


def _resized(images: Tensor, image_size: int) -> Tensor:
    out = torch.empty(*images.shape[:2], image_size, image_size, dtype=torch.uint8)
    for index, pixels in enumerate(images):
        array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
        out[index] = to_pixels(fit(Image.fromarray(array), (image_size, image_size)))
    return out


@dataclass(frozen=True, eq=False)
class _Files:
    """The image files of a data set and how they are to be read; ``key`` is their name in the cache."""

    spec: str
    listing: Listing
    image_size: int | None
    memory_limit: int
    workers: int
    value_range: tuple[float, float] | None
    cache: PixelCache
    key: str | None

    def load(self, *, imagenet: bool) -> _Loaded:
        """Decode the files, take their pixels from the cache, or prepare to stream them."""
        cached = self.cache.load(self.key)
        if cached is not None and self._is_usable(cached):
            return self._from_cache(cached)
        channels, size, deep = self._probe()
        if sum(map(len, self.listing.splits)) * channels * math.prod(size) <= self.memory_limit:
            return self._decode(channels, size, deep)
        return self._stream(channels, size, deep, imagenet)

    def _is_usable(self, cached: dict[str, Tensor]) -> bool:
        """Whether pixels in the cache are those of this listing, and few enough for the memory."""
        splits = dict(zip(("train", "val"), self.listing.splits, strict=False))
        pixels = {str(name): cached[name] for name in ("train", "val") if name in cached}
        return (
            pixels.keys() == splits.keys()
            and all(pixels[name].ndim == 4 and len(pixels[name]) == len(splits[name]) for name in splits)
            and sum(tensor.nbytes for tensor in pixels.values()) <= self.memory_limit
        )

    def _from_cache(self, cached: dict[str, Tensor]) -> _Loaded:
        train, *val = (
            PixelSource(cached[name], split.labels)
            for name, split in zip(("train", "val"), self.listing.splits, strict=False)
        )
        channels, height, width = train.images.shape[1:]
        values = _pair(cached["value_range"]) if "value_range" in cached else None
        return _Loaded(
            (channels, height, width), train, val[0] if val else None, cached["train_sums"], values
        )

    def _probe(self) -> tuple[int, tuple[int, int], bool]:
        """Learn channels, size and whether values have more than 8 bits from the headers of some images."""
        gray = True
        first: tuple[str, tuple[int, int]] | None = None
        deep: dict[bool, str] = {}
        for images in map(_encoded, self.listing.splits):
            for index in _spread(len(images), _PROBED):
                name = images.name(index)
                header = read_header(images.read(index), name)
                gray = gray and header.gray
                first = first or (name, header.size)
                deep.setdefault(header.deep, name)
                if self.image_size is None and header.size != first[1]:
                    raise mixed_sizes(name, header.size, first[0], first[1])
        assert first is not None  # a listing that passed its check is not empty
        check_depths(deep)
        size = first[1] if self.image_size is None else (self.image_size, self.image_size)
        return (1 if gray else 3), size, True in deep

    def _values(self, images: EncodedImages, indices: list[int]) -> ValueRange:
        """The range that the user gave, or that of these images."""
        if self.value_range is not None:
            return ValueRange(*self.value_range)
        logger.info("measuring the range of the pixel values of %s, once", self.spec)
        return measure_values(images, indices, self.workers)

    def _decode(self, channels: int, size: tuple[int, int], deep: bool) -> _Loaded:
        """Decode every image and put the pixels into the cache."""
        splits = self.listing.splits
        if self.key is not None:  # before the long part, not after it
            needed = sum(map(len, splits)) * channels * math.prod(size)
            require_space(self.cache.folder, needed, "the cache of the decoded images")
        logger.info("decoding the images of %s, once", self.spec)
        values = EIGHT_BIT
        if deep:
            ranges = [self._values(_encoded(split), list(range(len(split)))) for split in splits]
            values = ranges[0].including(ranges[-1])
        resize, tensors = self.image_size is not None, dict[str, Tensor]()
        for name, images in zip(("train", "val"), map(_encoded, splits), strict=False):
            indices = list(range(len(images)))
            tensors[name] = decode_all(
                images, indices, channels, size, resize=resize, threads=self.workers, values=values
            )
        tensors["train_sums"] = channel_sums(tensors["train"])
        if deep:
            tensors["value_range"] = values.tensor()
        self.cache.store(self.key, tensors)
        return self._from_cache(tensors)

    def _stream(self, channels: int, size: tuple[int, int], deep: bool, imagenet: bool) -> _Loaded:
        """Leave the images encoded; measure a sample, or use ImageNet's statistics for 1000 RGB classes."""
        values = self._sampled_range(_encoded(self.listing.train)) if deep else EIGHT_BIT
        train, *val = (
            EncodedSource(_encoded(split), split.labels, channels, size, self.image_size is not None, values)
            for split in self.listing.splits
        )
        sums = None if imagenet and channels == 3 else self._sampled_sums(train)
        limits = (values.low, values.high) if deep else None
        return _Loaded((channels, *size), train, val[0] if val else None, sums, limits)

    def _sampled_range(self, images: EncodedImages) -> ValueRange:
        """Range of the values of a sample of the training images; values outside are clipped later."""
        indices = _spread(len(images), _MEASURED)
        values = self._cached("range", "value_range", lambda: self._values(images, indices).tensor())
        return ValueRange(*_pair(values))

    def _sampled_sums(self, train: EncodedSource) -> Tensor:
        """`channel_sums` of a sample of the training images."""

        def measure() -> Tensor:
            indices = _spread(len(train), _MEASURED)
            logger.info("decoding %d images of %s to measure mean and std, once", len(indices), self.spec)
            decode = functools.partial(
                decode_all, train.images, channels=train.channels, size=train.size, resize=train.resize,
                ratio=train.ratio, threads=self.workers, values=train.values,
            )  # fmt: skip
            parts = (indices[start : start + 256] for start in range(0, len(indices), 256))  # may be large
            return torch.cat([channel_sums(decode(part)) for part in parts])

        return self._cached("sample", "train_sums", measure)

    def _cached(self, part: str, name: str, measure: Callable[[], Tensor]) -> Tensor:
        """A tensor of that name from the cache, or measured now and stored there."""
        key = self.key and f"{self.key}-{part}"
        cached = self.cache.load(key)
        if cached is not None and name in cached:
            return cached[name]
        tensor = measure()
        self.cache.store(key, {name: tensor})
        return tensor


def _pair(values: Tensor) -> tuple[float, float]:
    low, high = values.tolist()
    return low, high


def _encoded(split: ListedSplit) -> EncodedImages:
    assert not isinstance(split.images, Tensor)
    return split.images


def _spread(count: int, wanted: int) -> list[int]:
    """Return at most ``wanted`` indices, evenly spread over ``count``."""
    wanted = min(count, wanted)
    return [index * count // wanted for index in range(wanted)]


def _subset(source: PixelSource | EncodedSource, indices: Tensor) -> PixelSource | EncodedSource:
    if isinstance(source, PixelSource):
        return PixelSource(source.images[indices], source.labels[indices])
    return replace(source, images=SubsetImages(source.images, indices), labels=source.labels[indices])
