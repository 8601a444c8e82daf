"""``parquet:DIR``: ``train.parquet`` and ``test.parquet``, or the shards of a Hugging Face repository."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from clicktrain.data.cache import atomic_path, content_key, files_fingerprint, require_space
from clicktrain.data.listing import ListedSplit, Listing
from clicktrain.data.sources.arrow_images import (
    ArrowImages,
    Columns,
    damaged,
    find_columns,
    open_table,
    read_labels,
)
from clicktrain.errors import UserError

_SPLIT = re.compile(r"(?P<split>train|validation|valid|val|test)([-_.].*)?\.parquet")
_VAL_NAMES = ("validation", "val", "valid", "test")
MOST_ROWS = 100_000_000
"""Rows of the largest Parquet file that is read: their labels alone take 800 MB."""
_ROWS = 256  # rows that are converted at a time


@dataclass(frozen=True)
class _Shards:
    """The files of one split, their numbers of rows and the bytes of their image columns."""

    files: list[Path]
    counts: list[int]
    image_bytes: int
    columns: Columns


def list_parquet(argument: str, cache_dir: Path, memory_limit: int) -> Listing:
    """List the images of Parquet files by their footers and label columns.

    Files are ``train.parquet`` or ``train-*.parquet``, and in the same way ``validation``, ``val``, ``valid``
    or ``test`` (the first of them that exists), in DIR or in ``DIR/data``. See `find_columns` for the
    columns. A set whose encoded images exceed ``memory_limit`` bytes is copied to ``cache_dir`` once as an
    Arrow file, since Parquet cannot be read row by row.

    Raises:
        UserError: no such folder or files, a damaged file, a column missing, too little disk; names it.
    """
    root = Path(argument).expanduser()
    if not root.is_dir():
        raise UserError(
            f"data parquet:{argument}: {root} is not a folder; give the one that holds train.parquet"
        )
    splits = _find_files(root)
    if not splits and (root / "data").is_dir():
        splits = _find_files(root / "data")
    if "train" not in splits:
        names = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise UserError(f"{root} has no train.parquet or train-*.parquet; it holds {names}")
    val_name = next((name for name in _VAL_NAMES if name in splits), None)
    shards = [_inspect(splits[name]) for name in ("train", val_name) if name is not None]
    files = [file for split in shards for file in split.files]
    stream = sum(split.image_bytes for split in shards) > memory_limit
    train, *val = (_list_split(split, cache_dir if stream else None) for split in shards)
    return Listing(
        classes=next((split.columns.classes for split in shards if split.columns.classes), None),
        train=train,
        val=val[0] if val else None,
        fingerprint=lambda: files_fingerprint(files),
    )


def _find_files(folder: Path) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _SPLIT.fullmatch(path.name)
        if match and path.is_file():
            splits.setdefault(match["split"], []).append(path)
    return splits


def _inspect(files: list[Path]) -> _Shards:
    """Read the footers of a split's files."""
    counts, image_bytes = [], 0
    columns: Columns | None = None
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except (pa.ArrowException, OSError, OverflowError) as error:
            raise damaged(path, error) from error
        if not 0 <= metadata.num_rows <= MOST_ROWS:
            raise UserError(
                f"{path} says that it has {metadata.num_rows:,} rows; up to {MOST_ROWS:,} are read"
            )
        here = find_columns(schema, str(path))
        columns = columns or here
        if (here.image, here.label) != (columns.image, columns.label):
            raise UserError(
                f"{path} has columns {here.image}, {here.label} but {files[0]} has {columns.image}, "
                f"{columns.label}; all files of a split must agree"
            )
        counts.append(metadata.num_rows)
        for group, index in itertools.product(range(metadata.num_row_groups), range(metadata.num_columns)):
            column = metadata.row_group(group).column(index)
            if column.path_in_schema.split(".")[0] == columns.image:
                image_bytes += column.total_uncompressed_size
    assert columns is not None
    return _Shards(files, counts, image_bytes, columns)


def _list_split(shards: _Shards, copy_to: Path | None) -> ListedSplit:
    column = shards.columns.label
    labels = [read_labels(open_table(path, "parquet", [column]), column, str(path)) for path in shards.files]
    rows = [(str(path), count) for path, count in zip(shards.files, shards.counts, strict=True)]
    if copy_to is None:
        images = ArrowImages(shards.files, "parquet", shards.columns.image, rows)
    else:
        images = ArrowImages([_arrow_copy(shards, copy_to)], "arrow-file", shards.columns.image, rows)
    return ListedSplit(images, torch.cat(labels))


def _arrow_copy(shards: _Shards, folder: Path) -> Path:
    """Write the image column as one Arrow file, which can be mapped into memory and read in any order."""
    path = folder / f"parquet-{content_key(files_fingerprint(shards.files), shards.columns.image)}.arrow"
    if path.is_file() and _rows_of(path) == sum(shards.counts):
        return path
    require_space(folder, shards.image_bytes, f"the row-by-row copy of {shards.files[0].parent}")
    try:
        with atomic_path(path) as temporary:
            schema = pa.schema([pq.ParquetFile(shards.files[0]).schema_arrow.field(shards.columns.image)])
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for file in shards.files:
                    for batch in pq.ParquetFile(file).iter_batches(_ROWS, columns=[shards.columns.image]):
                        writer.write_batch(batch)
    except pa.ArrowException as error:
        raise damaged(shards.files[0], error) from error
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error}), but a Parquet data set of this size needs a copy there; "
            "set cache_dir to a folder that can be written"
        ) from error
    return path


def _rows_of(path: Path) -> int | None:
    """Return the number of rows of an Arrow file, or None for a damaged one."""
    try:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            return sum(int(reader.get_batch(index).num_rows) for index in range(reader.num_record_batches))
    except (pa.ArrowException, OSError):
        return None
