"""From the bytes of an image file to uint8 pixels, with Pillow, and the standard resizing recipes."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clicktrain.data.listing import EncodedImages
from clicktrain.errors import UserError

_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"})
_CHUNK = 64  # images per task of a decoding thread


@dataclass(frozen=True)
class Header:
    """What the first bytes of an image file tell."""

    size: tuple[int, int]
    """Height, width in pixels."""
    grey: bool


def read_header(data: bytes, name: str) -> Header:
    """Read the size and the colour mode without decoding.

    Raises:
        UserError: not an image that Pillow knows.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return Header((image.height, image.width), image.mode in _GREY_MODES)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
        raise _broken(name, error) from error


def decode_image(data: bytes, name: str, channels: int) -> Image.Image:
    """Decode one file to an 8-bit grey (1 channel) or RGB (3 channels) image.

    An EXIF rotation is not applied, as in the usual ImageNet pipelines; transparency is dropped.

    Raises:
        UserError: truncated, broken or not an image; or in colour where ``channels`` is 1. Names the file.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # see read_header
        raise _broken(name, error) from error
    return _to_mode(image, name, channels)


def _to_mode(image: Image.Image, name: str, channels: int) -> Image.Image:
    """Convert to 8-bit grey or RGB."""
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))
    wanted = "L" if channels == 1 else "RGB"
    if image.mode == wanted:
        return image
    if channels == 1 and image.mode not in _GREY_MODES:
        raise UserError(
            f"{name} is in colour although the images looked at first are grey; convert them all to one of "
            "the two"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(wanted)


def _broken(name: str, error: Exception) -> UserError:
    reason = str(error).split(" <")[0] or type(error).__name__  # Pillow ends with the address of a buffer
    return UserError(
        f"{name} is not a whole image ({reason}); replace it with a good copy or remove it, then start again"
    )


def fit(image: Image.Image, size: tuple[int, int], ratio: float = 1.0) -> Image.Image:
    """Resize so that the image covers ``ratio`` x ``size``, and keep the centre of ``size``.

    With ``ratio`` 256/224 this is the Resize + CenterCrop of the ImageNet recipe, done in one antialiased
    pass. An image that has the size already is returned as it is.

    Args:
        image: any size.
        size: height, width of the result.
        ratio: at least 1.
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
) -> Tensor:
    """Decode images in threads (Pillow decodes outside the interpreter lock).

    Args:
        images: where to read.
        indices: which of them, in the order of the result.
        channels: 1 or 3.
        size: height, width of the result.
        resize: fit images of other sizes (see `fit`); otherwise another size is an error.
        ratio: see `fit`.
        threads: how many.

    Returns:
        uint8 [len(indices), C, H, W].

    Raises:
        UserError: for the first image, in order, that is broken or of another size.
    """
    out = torch.empty(len(indices), channels, *size, dtype=torch.uint8)

    def decode_chunk(start: int) -> None:
        for row in range(start, min(start + _CHUNK, len(indices))):
            name = images.name(indices[row])
            image = decode_image(images.read(indices[row]), name, channels)
            if not resize:
                check_size(image, size, name)
            out[row] = to_pixels(fit(image, size, ratio))

    pool = ThreadPoolExecutor(max_workers=max(threads, 1))
    try:
        for _ in pool.map(decode_chunk, range(0, len(indices), _CHUNK)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)
    return out


def check_size(image: Image.Image, size: tuple[int, int], name: str) -> None:
    """Raise a `UserError` unless the image has this height and width."""
    if image.size != (size[1], size[0]):
        raise mixed_sizes(name, (image.height, image.width), "others", size)


def mixed_sizes(name: str, size: tuple[int, int], other: str, other_size: tuple[int, int]) -> UserError:
    """Return the error for images of several sizes where no common one was asked for."""
    return UserError(
        f"images are of mixed sizes ({name} is {size[1]}x{size[0]}, {other} {other_size[1]}x{other_size[0]} "
        "pixels); "
        "set image_size, for example 224, to resize them all"
    )
