"""Small real image files for the tests of clicktrain.data."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def pixels(
    seed: int, size: tuple[int, int] = (8, 8), channels: int = 3
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A smooth random picture [H, W, C] (JPEG keeps it nearly as it is), or [H, W] for one channel."""
    coarse = np.random.default_rng(seed).integers(0, 256, (2, 2, channels), dtype=np.uint8)
    image = Image.fromarray(coarse[..., 0] if channels == 1 else coarse)
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def encode(array: np.ndarray[Any, Any], form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


def write_class_folders(
    root: Path,
    classes: Sequence[str] = ("cat", "dog"),
    per_class: int = 4,
    size: tuple[int, int] = (8, 8),
    suffix: str = "png",
    seed: int = 0,
) -> None:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            array = pixels(seed + 100 * number + index, size)
            (root / name / f"{index}.{suffix}").write_bytes(
                encode(array, {"jpg": "JPEG"}.get(suffix, suffix))
            )


def write_parquet(
    path: Path,
    labels: Sequence[int | None],
    *,
    images: Sequence[bytes | None] | None = None,
    names: Sequence[str] | None = None,
    image_column: str = "image",
    label_column: str = "label",
    plain_bytes: bool = False,
    seed: int = 0,
) -> None:
    """Write images and labels as Hugging Face does; ``names`` adds its description of the columns."""
    if images is None:
        images = [encode(pixels(seed + index)) for index in range(len(labels))]
    if plain_bytes:
        column = pa.array(images, pa.binary())
    else:
        rows = [
            None if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)
        ]
        column = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({image_column: column, label_column: pa.array(labels, pa.int64())})
    if names is not None:
        features = {
            image_column: {"_type": "Image"},
            label_column: {"names": list(names), "_type": "ClassLabel"},
        }
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
