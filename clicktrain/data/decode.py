"""Decoding image files to uint8 pixels with Pillow, and the standard resizing recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clicktrain.data.image_files import GRAY_MODES, broken, read_image
from clicktrain.data.listing import EncodedImages
from clicktrain.data.statistics import EIGHT_BIT, ValueRange, range_of
from clicktrain.errors import UserError

T = TypeVar("T")

_CHUNK = 64  # images per task of a decoding thread


def decode_image(data: bytes, name: str, channels: int, values: ValueRange | None = None) -> Image.Image:
    """Decode one file to an 8-bit gray (1 channel) or RGB (3 channels) image.

    - 8 bits a channel (gray, color, palette, CMYK, YCbCr) and 1 bit: values as they are, 1 bit as 0 and 255.
    - 16 or 32 bits, signed or not, and floating point (PNG, PPM, TIFF): ``values`` becomes 0 to 255. A file
      does not say which values it uses (8 or 12 bits in 16, 0 to 1), so the range is measured, see
      `ValueRange`. NaN and infinities are an error.
    - Transparency is dropped; an image that shows nothing without it is an error.
    - Of an animation or a file of several pages the first frame is taken.
    - An EXIF rotation is not applied, as in the usual ImageNet pipelines.

    ``values`` is the range of the data set: `EIGHT_BIT` for 8-bit images, None for that of this image alone.

    Raises:
        UserError: truncated, broken or not an image; in color where ``channels`` is 1; deeper than 8 bits in
            a data set of 8-bit images, or the other way round. Names the file.
    """
    image = read_image(data, name)
    if isinstance(image, Image.Image):
        if values not in (None, EIGHT_BIT):
            raise _mixed_depths(name, "8 bits or fewer", "more")
        return _to_mode(image, name, channels)
    if values == EIGHT_BIT:
        raise _mixed_depths(name, "more than 8 bits", "8")
    own = range_of(image, name)
    return _to_mode(Image.fromarray((own if values is None else values).to_8_bit(image)), name, channels)


def values_of(data: bytes, name: str) -> ValueRange | None:
    """Smallest and largest value of an image deeper than 8 bits, else None; errors as `decode_image`."""
    image = read_image(data, name)
    return None if isinstance(image, Image.Image) else range_of(image, name)


def _mixed_depths(name: str, depth: str, others: str) -> UserError:
    return UserError(
        f"{name} has {depth} per value although the images looked at first have {others}; "
        "convert them all to one depth"
    )


def _to_mode(image: Image.Image, name: str, channels: int) -> Image.Image:
    """Convert an image of at most 8 bits a channel to 8-bit gray or RGB."""
    wanted = "L" if channels == 1 else "RGB"
    if image.mode == wanted:
        return image
    if channels == 1 and image.mode not in GRAY_MODES:
        raise UserError(
            f"{name} is in color although the images looked at first are gray; convert them all to one of "
            "the two"
        )
    transparent = image.has_transparency_data
    if transparent and image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    try:
        opaque = image.convert(wanted)
    except ValueError as error:  # LAB, which Pillow cannot convert
        raise broken(name, error) from error
    if transparent and _constant(opaque) and image.mode in ("LA", "RGBA") and not _constant(image):
        raise UserError(f"{name} has a picture in its transparency only; put it on a background or remove it")
    return opaque


def _constant(image: Image.Image) -> bool:
    """Whether each channel has one value only."""
    extrema = image.getextrema()
    pairs = extrema if isinstance(extrema[0], tuple) else (extrema,)
    return all(low == high for low, high in pairs)


def fit(image: Image.Image, size: tuple[int, int], ratio: float = 1.0) -> Image.Image:
    """Resize so that the image covers ``ratio`` x ``size``, and keep the center of ``size``.

    With ``ratio`` 256/224 this is the Resize + CenterCrop of the ImageNet recipe, done in one antialiased
    pass. An image that has the ``size`` (height, width) already is returned as it is.
    """
    height, width = size
    if image.size == (width, height):
        return image
    scale = min(image.width / width, image.height / height) / ratio
    left = (image.width - width * scale) / 2
    top = (image.height - height * scale) / 2
    box = (left, top, left + width * scale, top + height * scale)
    return image.resize((width, height), Image.Resampling.BILINEAR, box=box)


def to_pixels(image: Image.Image) -> Tensor:
    """Copy an 8-bit image to uint8 [C, H, W]."""
    pixels = np.array(image)
    return torch.from_numpy(
        pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    )


def decode_all(
    images: EncodedImages,
    indices: list[int],
    channels: int,
    size: tuple[int, int],
    *,
    resize: bool,
    ratio: float = 1.0,
    threads: int = 1,
    values: ValueRange | None = None,
) -> Tensor:
    """Decode images to uint8 [N, C, H, W] in threads (Pillow decodes outside the interpreter lock).

    Images of another ``size`` (height, width) are fitted (see `fit`) with ``resize``, otherwise an error. See
    `decode_image` for ``channels`` and ``values``.

    Raises:
        UserError: for the first image, in order, that is broken or of another size.
    """
    out = torch.empty(len(indices), channels, *size, dtype=torch.uint8)

    def decode_chunk(start: int) -> None:
        for row in range(start, min(start + _CHUNK, len(indices))):
            name = images.name(indices[row])
            image = decode_image(images.read(indices[row]), name, channels, values)
            if not resize:
                check_size(image, size, name)
            out[row] = to_pixels(fit(image, size, ratio))

    for _ in _in_threads(decode_chunk, len(indices), threads):
        pass
    return out


def measure_values(images: EncodedImages, indices: list[int], threads: int = 1) -> ValueRange:
    """Return the range of the values in images that are deeper than 8 bits.

    Raises:
        UserError: for the first image, in order, that is broken or has 8 bits.
    """

    def measure_chunk(start: int) -> ValueRange | None:
        values = None
        for index in indices[start : start + _CHUNK]:
            own = values_of(images.read(index), images.name(index))
            if own is None:
                raise _mixed_depths(images.name(index), "8 bits or fewer", "more")
            values = own.including(values)
        return values

    values: ValueRange | None = None
    for part in _in_threads(measure_chunk, len(indices), threads):
        values = values if part is None else part.including(values)
    assert values is not None  # a listing that passed its check is not empty
    return values


def _in_threads(chunk: Callable[[int], T], count: int, threads: int) -> Iterator[T]:
    """Yield ``chunk(start)`` for every run of images, in order; the first error ends it."""
    pool = ThreadPoolExecutor(max_workers=max(threads, 1))
    try:
        yield from pool.map(chunk, range(0, count, _CHUNK))
    finally:
        pool.shutdown(cancel_futures=True)


def check_size(image: Image.Image, size: tuple[int, int], name: str) -> None:
    """Raise a `UserError` unless the image has this height and width."""
    if image.size != (size[1], size[0]):
        raise mixed_sizes(name, (image.height, image.width), "others", size)


def mixed_sizes(name: str, size: tuple[int, int], other: str, other_size: tuple[int, int]) -> UserError:
    """Return the error for images of several sizes where no common one was asked for."""
    return UserError(
        f"images are of mixed sizes ({name} is {size[1]}x{size[0]}, {other} {other_size[1]}x{other_size[0]} "
        "pixels); set image_size, for example 224, to resize them all"
    )


def check_depths(deep: dict[bool, str]) -> None:
    """Raise a UserError where some images have more than 8 bits (``deep[True]`` names one) and others not."""
    if len(deep) > 1:
        raise UserError(
            f"{deep[True]} has more than 8 bits per value and {deep[False]} has not; convert them all to "
            "one depth, so that equal values mean equal brightness"
        )
