"""Numbers by which two copies of a data set are compared."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch

from clicktrain.data.image_data import EncodedSource, ImageData, PixelSource, Source
from clicktrain.data.shards.source import ShardSource

_LOOKED_AT = 2048
"""Images of each split whose pixels or names are read, spread over all of it."""


def fingerprint(data: ImageData) -> dict[str, Any]:
    """Counts and checksums of classes, labels and of some images of each split; cheap for any size."""
    facts: dict[str, Any] = {
        "classes": zlib.crc32("\n".join(data.classes).encode()),
        "image shape": tuple(data.image_shape),
    }
    for name, source in (("training", data.train), ("validation", data.val), ("test", data.test)):
        if source is not None:
            facts |= {f"{what} of {name} images": value for what, value in _of_split(source).items()}
    # Last: where only these differ, images that were not looked at do.
    return {**facts, "mean color": tuple(data.mean), "deviation of colors": tuple(data.std)}


def _of_split(source: Source) -> dict[str, int]:
    if isinstance(source, ShardSource):  # labels stay in the shards
        return {
            "number": len(source),
            "checksum of counts": zlib.crc32(source.pieces.counts.tobytes()),
            "checksum of names": _of_names(source.name, len(source)),
        }
    labels = source.labels.cpu().contiguous().numpy()
    facts = {"number": len(source), "checksum of labels": zlib.crc32(labels.tobytes())}
    looked_at = torch.arange(0, len(source), max(len(source) // _LOOKED_AT, 1))
    if isinstance(source, PixelSource):
        pixels = source.images[looked_at.to(source.images.device)].cpu().contiguous().numpy()
        facts["checksum of pixels"] = zlib.crc32(pixels.tobytes())
    elif isinstance(source, EncodedSource):
        facts["checksum of names"] = _of_names(source.images.name, len(source))
    return facts


def _of_names(name: Callable[[int], str], number: int) -> int:
    """Checksum of names without folders, which differ from machine to machine."""
    looked_at = range(0, number, max(number // _LOOKED_AT, 1))
    return zlib.crc32("\n".join(name(index).rpartition("/")[2] for index in looked_at).encode())
