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
from clicktrain.data.decode import decode_all, fit, measure_values, mixed_sizes, to_pixels
from clicktrain.data.image_data import EncodedSource, ImageData, PixelSource, Source
from clicktrain.data.image_files import read_header
from clicktrain.data.listing import EncodedImages, ListedSplit, Listing, SubsetImages, stratified_split
from clicktrain.data.spec import DataSpec
from clicktrain.data.statistics import IMAGENET_MEAN, IMAGENET_STD, channel_sums, mean_and_std
from clicktrain.data.value_range import EIGHT_BIT, ValueRange
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
    seed: int = 0,
    cache_dir: Path | None = None,
    workers: int = 2,
    memory_limit: int = MEMORY_LIMIT,
    value_range: tuple[float, float] | None = None,
) -> ImageData:
    """Open a data set.

    Images that take at most ``memory_limit`` when decoded are decoded at once, in threads, and kept as uint8
    tensors, also in the cache for the next start; other data sets are decoded while training.

    Args:
        spec: ``digits``, ``parquet:DIR``, ``imagefolder:DIR``, ``cifar10:DIR``, ``cifar100:DIR``,
            ``synthetic:classes=10,size=32,channels=3,train=512,val=128,seed=0`` or the name of a Hugging Face
            data set (``NAME``, ``OWNER/NAME``, with ``:CONFIG``).
        image_size: side in pixels; images of other sizes are resized to cover the square and their center is
            kept. None keeps the size that all images have.
        val_fraction: share of each class that is held out, only where the data set has no validation split.
        seed: of that draw alone.
        cache_dir: folder for decoded images; None is the platform's.
        workers: decoding threads now, and decoding processes in a loader of a set that does not fit.
        memory_limit: bytes.
        value_range: of images deeper than 8 bits, the values that become 0 and 255: that of the data that a
            network was trained on. None measures it: over all images, or over a sample of those that are
            decoded while training. Without effect on 8-bit images.

    Raises:
        UserError: the arguments or the data are wrong; one sentence says what.
    """
    _check_arguments(image_size, val_fraction, workers)
    folder = cache_dir if cache_dir is not None else default_cache_dir()
    parsed = DataSpec.parse(spec)
    try:
        listing = _list(parsed, folder, cache_dir, memory_limit)
    except OSError as error:  # a folder without permission, a disk that fails
        raise UserError(
            f"data {shown(spec, 150)} cannot be read ({shortened(str(error), 200)}); check the folder's "
            "permissions"
        ) from error
    classes = listing.check(spec)
    if isinstance(listing.train.images, Tensor):
        loaded = _from_pixels(listing, image_size, memory_limit)
    else:
        request = _Request(
            spec, parsed.kind, image_size, memory_limit, workers, PixelCache(folder), value_range
        )
        loaded = _from_files(listing, request, imagenet=len(classes) == 1000)
    train, val, train_sums = loaded.train, loaded.val, loaded.train_sums
    if val is None:
        kept, held_out = stratified_split(train.labels, val_fraction, seed, spec)
        train, val = _subset(train, kept), _subset(train, held_out)
        if isinstance(train, PixelSource) and train_sums is not None:
            train_sums = train_sums[kept]
    height, width = loaded.shape[1:]
    mean, std = (
        (IMAGENET_MEAN, IMAGENET_STD) if train_sums is None else mean_and_std(train_sums, height * width)
    )
    data = ImageData(spec, classes, loaded.shape, mean, std, train, val, workers, loaded.value_range)
    logger.info("%s", data.describe())
    return data


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
    """List the images; sources are imported here, as most need a library of their own."""
    if spec.kind == "digits":
        from clicktrain.data.sources.digits import list_digits

        return list_digits()
    if spec.kind == "synthetic":
        from clicktrain.data.sources.synthetic import list_synthetic

        return list_synthetic(spec.argument, memory_limit)
    if spec.kind == "imagefolder":
        from clicktrain.data.sources.image_folder import list_image_folder

        return list_image_folder(spec.argument)
    if spec.kind == "parquet":
        from clicktrain.data.sources.parquet import list_parquet

        return list_parquet(spec.argument, folder, memory_limit)
    if spec.kind == "hub":
        from clicktrain.data.sources.hub import list_hub

        return list_hub(spec.argument, spec.config, cache_dir)
    from clicktrain.data.sources.cifar import list_cifar

    return list_cifar(spec.kind, spec.argument)


@dataclass(frozen=True, eq=False)
class _Loaded:
    """The splits of the source; ``train_sums`` is None where ImageNet's statistics are used."""

    shape: tuple[int, int, int]
    train: Source
    val: Source | None
    train_sums: Tensor | None
    value_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Request:
    spec: str
    kind: str
    image_size: int | None
    memory_limit: int
    workers: int
    cache: PixelCache
    value_range: tuple[float, float] | None

    def values(self, images: EncodedImages, indices: list[int]) -> ValueRange:
        """The range that the user gave, or that of these images."""
        if self.value_range is not None:
            return ValueRange(*self.value_range)
        logger.info("measuring the range of the pixel values of %s, once", self.spec)
        return measure_values(images, indices, self.workers)


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
    val = source(listing.val) if listing.val is not None else None
    return _Loaded((channels, height, width), train, val, channel_sums(train.images))


def _resized(images: Tensor, image_size: int) -> Tensor:
    out = torch.empty(*images.shape[:2], image_size, image_size, dtype=torch.uint8)
    for index, pixels in enumerate(images):
        array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
        out[index] = to_pixels(fit(Image.fromarray(array), (image_size, image_size)))
    return out


def _from_files(listing: Listing, request: _Request, *, imagenet: bool) -> _Loaded:
    """Decode the files, take their pixels from the cache, or prepare to stream them."""
    key = None
    if listing.fingerprint is not None:
        key = f"{request.kind}-{content_key(listing.fingerprint(), request.image_size, request.value_range)}"
    cached = request.cache.load(key) if key is not None else None
    if cached is not None and _is_usable(cached, listing, request):
        return _from_cache(cached, listing)
    splits = [split for split in (listing.train, listing.val) if split is not None]
    channels, size, deep = _probe(splits, request)
    count = sum(map(len, splits))
    if count * channels * math.prod(size) <= request.memory_limit:
        return _decode(listing, channels, size, request, key, deep=deep)
    return _stream(listing, channels, size, request, key, imagenet=imagenet, deep=deep)


def _is_usable(cached: dict[str, Tensor], listing: Listing, request: _Request) -> bool:
    """Whether pixels in the cache are those of this listing, and few enough for the memory."""
    splits = {"train": listing.train, "val": listing.val}
    for name, split in splits.items():
        if (split is None) != (name not in cached):
            return False
        if split is not None and (cached[name].ndim != 4 or len(cached[name]) != len(split)):
            return False
    return sum(cached[name].nbytes for name in splits if name in cached) <= request.memory_limit


def _from_cache(cached: dict[str, Tensor], listing: Listing) -> _Loaded:
    train = PixelSource(cached["train"], listing.train.labels)
    val = PixelSource(cached["val"], listing.val.labels) if listing.val is not None else None
    channels, height, width = train.images.shape[1:]
    values = _pair(cached["value_range"]) if "value_range" in cached else None
    return _Loaded((channels, height, width), train, val, cached["train_sums"], values)


def _pair(values: Tensor) -> tuple[float, float]:
    low, high = values.tolist()
    return low, high


def _encoded(split: ListedSplit) -> EncodedImages:
    assert not isinstance(split.images, Tensor)
    return split.images


def _probe(splits: list[ListedSplit], request: _Request) -> tuple[int, tuple[int, int], bool]:
    """Learn channels, size and whether values have more than 8 bits from the headers of some images."""
    gray = True
    first: tuple[str, tuple[int, int]] | None = None
    deep: dict[bool, str] = {}
    for split in splits:
        images = _encoded(split)
        for index in _spread(len(images), _PROBED):
            header = read_header(images.read(index), images.name(index))
            gray = gray and header.gray
            first = first or (images.name(index), header.size)
            deep.setdefault(header.deep, images.name(index))
            if request.image_size is None and header.size != first[1]:
                raise mixed_sizes(images.name(index), header.size, first[0], first[1])
    assert first is not None  # a listing that passed its check is not empty
    if len(deep) > 1:
        raise UserError(
            f"{deep[True]} has more than 8 bits per value and {deep[False]} has not; convert them all to one "
            "depth, so that equal values mean equal brightness"
        )
    size = first[1] if request.image_size is None else (request.image_size, request.image_size)
    return (1 if gray else 3), size, True in deep


def _spread(count: int, wanted: int) -> list[int]:
    """Return at most ``wanted`` indices, evenly spread over ``count``."""
    wanted = min(count, wanted)
    return [index * count // wanted for index in range(wanted)]


def _decode(
    listing: Listing,
    channels: int,
    size: tuple[int, int],
    request: _Request,
    key: str | None,
    *,
    deep: bool,
) -> _Loaded:
    """Decode every image and put the pixels into the cache."""
    resize = request.image_size is not None
    splits = [split for split in (listing.train, listing.val) if split is not None]
    values = EIGHT_BIT

    def pixels(split: ListedSplit) -> Tensor:
        images = _encoded(split)
        indices = list(range(len(images)))
        return decode_all(
            images, indices, channels, size, resize=resize, threads=request.workers, values=values
        )

    if key is not None:  # before the long part, not after it
        needed = (len(listing.train) + len(listing.val or ())) * channels * math.prod(size)
        require_space(request.cache.folder, needed, "the cache of the decoded images")
    logger.info("decoding the images of %s, once", request.spec)
    if deep:
        ranges = [request.values(_encoded(split), list(range(len(split)))) for split in splits]
        values = ranges[0].including(ranges[-1])
    tensors = {"train": pixels(listing.train)}
    if listing.val is not None:
        tensors["val"] = pixels(listing.val)
    tensors["train_sums"] = channel_sums(tensors["train"])
    if deep:
        tensors["value_range"] = torch.tensor([values.low, values.high], dtype=torch.float64)
    if key is not None:
        request.cache.store(key, tensors)
    return _from_cache(tensors, listing)


def _stream(
    listing: Listing,
    channels: int,
    size: tuple[int, int],
    request: _Request,
    key: str | None,
    *,
    imagenet: bool,
    deep: bool,
) -> _Loaded:
    """Leave the images encoded; measure a sample, or use ImageNet's statistics for 1000 RGB classes."""
    values = _sampled_range(_encoded(listing.train), request, key) if deep else EIGHT_BIT

    def source(split: ListedSplit) -> EncodedSource:
        resize = request.image_size is not None
        return EncodedSource(_encoded(split), split.labels, channels, size, resize, values)

    train = source(listing.train)
    val = source(listing.val) if listing.val is not None else None
    sums = None
    if not (imagenet and channels == 3):
        sums = _sampled_sums(train, request, key)
    return _Loaded((channels, *size), train, val, sums, (values.low, values.high) if deep else None)


def _sampled_range(images: EncodedImages, request: _Request, key: str | None) -> ValueRange:
    """Range of the values of a sample of the training images; values outside are clipped later."""

    def measure() -> Tensor:
        values = request.values(images, _spread(len(images), _MEASURED))
        return torch.tensor([values.low, values.high], dtype=torch.float64)

    return ValueRange(*_pair(_cached(request, key and f"{key}-range", "value_range", measure)))


def _sampled_sums(train: EncodedSource, request: _Request, key: str | None) -> Tensor:
    """`channel_sums` of a sample of the training images."""

    def measure() -> Tensor:
        indices = _spread(len(train), _MEASURED)
        logger.info("decoding %d images of %s to measure mean and std, once", len(indices), request.spec)
        parts = (indices[start : start + 256] for start in range(0, len(indices), 256))  # they may be large
        decode = functools.partial(
            decode_all, train.images, channels=train.channels, size=train.size, resize=train.resize,
            ratio=train.ratio, threads=request.workers, values=train.values,
        )  # fmt: skip
        return torch.cat([channel_sums(decode(part)) for part in parts])

    return _cached(request, key and f"{key}-sample", "train_sums", measure)


def _cached(request: _Request, key: str | None, name: str, measure: Callable[[], Tensor]) -> Tensor:
    """A tensor of that name from the cache, or measured now and stored there."""
    cached = request.cache.load(key) if key is not None else None
    if cached is not None and name in cached:
        return cached[name]
    tensor = measure()
    if key is not None:
        request.cache.store(key, {name: tensor})
    return tensor


def _subset(source: Source, indices: Tensor) -> Source:
    if isinstance(source, PixelSource):
        return PixelSource(source.images[indices], source.labels[indices])
    return replace(source, images=SubsetImages(source.images, indices), labels=source.labels[indices])
