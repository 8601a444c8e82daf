"""Small shards for the tests of data that is streamed."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from image_files import encode, pixels

from clicktrain.data import ImageData, ShardSource, open_data


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tar(
    path: Path,
    labels: Sequence[int | str | None],
    *,
    images: Sequence[bytes] | None = None,
    seed: int = 0,
    label_kind: str = "cls",
    image_kind: str = "png",
) -> None:
    """Write samples ``a/000000.png`` and their labels; None is a sample without one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index, label in enumerate(labels):
            data = encode(pixels(seed + index, channels=1)) if images is None else images[index]
            add(tar, f"a/{index:06}.{image_kind}", data)
            if label is not None:
                text = json.dumps({"label": label}) if label_kind == "json" else f"{label}\n"
                add(tar, f"a/{index:06}.{label_kind}", text.encode())


def write_groups(
    path: Path, labels: Sequence[int | None], *, rows: int = 16, images: Sequence[bytes] | None = None,
    seed: int = 0, names: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Write a Parquet shard in row groups of ``rows``."""
    if images is None:
        images = [encode(pixels(seed + index, channels=1)) for index in range(len(labels))]
    column = pa.array(
        [{"bytes": data, "path": None} for data in images],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": column, "label": pa.array(labels, pa.int64())})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)


def write_shards(
    kind: str, folder: Path, sizes: Sequence[int], split: str = "train", seed: int = 0, classes: int = 3
) -> None:
    """Write shards of these numbers of samples; labels go round."""
    for number, size in enumerate(sizes):
        labels = [(seed + index) % classes for index in range(size)]
        if kind == "webdataset":
            write_tar(folder / f"{split}-{number:03}.tar", labels, seed=seed)
        else:
            write_groups(folder / f"{split}-{number:05}-of-{len(sizes):05}.parquet", labels, seed=seed)
        seed += size


def opened(kind: str, folder: Path, cache_dir: Path, **settings: int | None) -> ImageData:
    data = open_data(f"{kind}:{folder}", cache_dir=cache_dir, **settings)  # type: ignore[arg-type]
    assert isinstance(data.train, ShardSource)
    return data
