"""Open image files that anybody may have made, with Pillow: of known formats, of bounded size, and whole.

Without a list of formats Pillow would go by a file's content: an EPS that is called ``.png`` starts
Ghostscript, and two dozen rare readers see bytes that nobody has tested them with.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from clicktrain.errors import UserError, shortened

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "GIF", "TIFF")
"""Formats that are read, whatever a file is called."""
LARGEST_FILE = 512 * 2**20
"""Bytes of the largest image file that is read."""
GRAY_MODES = frozenset({"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"})
_DEEP_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N", "F"})
_LOW_BYTES = {
    "RGB;16B": "RGB;16L",
    "RGB;16L": "RGB;16B",
    "RGBA;16B": "RGBA;16L",
    "RGBA;16L": "RGBA;16B",
    "RGB;16N": "RGB;16B" if np.little_endian else "RGB;16L",
    "RGBA;16N": "RGBA;16B" if np.little_endian else "RGBA;16L",
}
"""Pillow keeps the high byte of 16-bit colors. Read as of the other byte order, a file gives the low one."""
_GRAY_WITH_ALPHA = "LA;16B"

Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Header:
    """The facts in the first bytes of an image file."""

    size: tuple[int, int]
    """Height, width in pixels."""
    gray: bool
    deep: bool
    """Whether values have more than 8 bits: 16 or 32, or floating point."""


def read_header(data: bytes, name: str) -> Header:
    """Read the size, the color mode and the depth without decoding.

    Raises:
        UserError: not an image of `FORMATS`, or one of too many pixels.
    """
    with _opened(data, name) as image:
        rawmode = _deep_color(image)
        gray = image.mode in GRAY_MODES or rawmode == _GRAY_WITH_ALPHA
        return Header((image.height, image.width), gray, rawmode is not None or image.mode in _DEEP_MODES)


def read_image(data: bytes, name: str) -> Image.Image | Values:
    """Decode one file: the image as Pillow has it, or the values where they have more than 8 bits.

    Of several frames the first is read. Values are [H, W] (gray) or [H, W, 3], without transparency, of the
    file's own dtype.

    Raises:
        UserError: truncated, broken, not an image of `FORMATS`, or of too many pixels. Names the file.
    """
    with _opened(data, name) as image:
        rawmode = _deep_color(image)
        if rawmode is None:
            image.load()
            return np.asarray(image) if image.mode in _DEEP_MODES else image
        if rawmode == _GRAY_WITH_ALPHA:  # 4 bytes a pixel: the two of gray, the two of transparency
            bytes_ = _decoded_as(image, "RGBA")
            return bytes_[..., 0].astype(np.uint16) << 8 | bytes_[..., 1]
        image.load()
        high = np.asarray(image)[..., :3].astype(np.uint16) << 8
    with _opened(data, name) as image:
        return high | _decoded_as(image, _LOW_BYTES[rawmode])[..., :3]


def broken(name: str, error: Exception) -> UserError:
    """Return the error for a file that cannot be decoded."""
    reason = str(error).split(" <")[0] or type(error).__name__  # Pillow ends with the address of a buffer
    if reason == "cannot identify image file":
        reason = f"not of the formats {', '.join(FORMATS)}"
    return UserError(
        f"{name} is not a whole image ({shortened(reason, 100)}); "
        "replace it with a good copy or remove it, then start again"
    )


@contextlib.contextmanager
def _opened(data: bytes, name: str) -> Iterator[Image.Image]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            yield image
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"{name} has more pixels than are safe to decode; make it smaller or remove it"
        ) from None
    except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
        raise broken(name, error) from error


def _deep_color(image: Image.Image) -> str | None:
    """How the file holds colors, or gray with transparency, of 16 bits; None for any other image."""
    if image.mode not in ("RGB", "RGBA"):
        return None
    modes = {part for tile in getattr(image, "tile", ()) for part in _words(tile[3]) if ";16" in part}
    if not modes:
        return None
    (rawmode,) = modes if len(modes) == 1 else ("several",)
    if rawmode not in (*_LOW_BYTES, _GRAY_WITH_ALPHA):
        raise ValueError(f"16-bit colors as {rawmode} are not read: store it as an ordinary 16-bit PNG")
    return rawmode


def _words(arguments: Any) -> list[str]:
    """The texts among the arguments of a Pillow decoder."""
    parts = arguments if isinstance(arguments, tuple) else (arguments,)
    return [part for part in parts if isinstance(part, str)]


def _decoded_as(image: Image.Image, rawmode: str) -> Values:
    """Decode an opened file as if its bytes were laid out as ``rawmode`` says; of the same bytes a pixel."""
    tiles = []
    for codec, extents, offset, arguments in image.tile:  # type: ignore[attr-defined]
        if isinstance(arguments, tuple):
            changed: Any = tuple(rawmode if isinstance(a, str) and ";16" in a else a for a in arguments)
        else:
            changed = rawmode
        tiles.append((codec, extents, offset, changed))
    first = image.tile[0]  # type: ignore[attr-defined]
    image.tile = [type(first)(*tile) if hasattr(first, "_fields") else tile for tile in tiles]  # type: ignore[attr-defined]
    image.load()
    return np.asarray(image)
