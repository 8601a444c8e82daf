"""``parquet-shards:DIR``: Parquet files that are read by row groups, without a copy on disk.

pyarrow alone reads them. Streaming by ``datasets`` loses its place in a shuffle: its documentation says that
"examples from shuffle buffers are lost when resuming".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clicktrain.data.shards.source import Ints, LabelCounts, Piece, Pieces, Sample
from clicktrain.data.sources.arrow_images import Columns, damaged, file_bytes, find_columns, read_labels
from clicktrain.errors import UserError
from clicktrain.limits import in_words

LARGEST_GROUP = 512 * 2**20
"""Uncompressed bytes of the images of a row group, which is read as a whole."""
_ARROW_ERRORS = (pa.ArrowException, OSError, OverflowError, KeyError)


class ParquetShards:
    """Reads rows of Parquet files."""

    def __init__(self, files: Sequence[Path], columns: Columns) -> None:
        self.files = tuple(files)
        self._image, self._label = columns.image, columns.label

    def read(self, piece: Piece, rows: Sequence[int]) -> list[Sample]:
        """Read some rows of a row group: see `ShardReader.read`."""
        local = pa.array(np.asarray(rows, dtype=np.int64) - piece.base)
        table = self._group(piece, [self._image, self._label])
        try:
            table = table.take(local)
            images = [value for chunk in table.column(self._image).chunks for value in chunk.to_pylist()]
        except _ARROW_ERRORS as error:
            raise damaged(self.files[piece.shard], error) from error
        path = self.files[piece.shard]
        labels = read_labels(table, self._label, str(path), rows[0] if rows else 0).tolist()
        return [
            Sample(file_bytes(image, lambda row=row: self.name(piece, row)), label)  # type: ignore[misc]
            for row, image, label in zip(rows, images, labels, strict=True)
        ]

    def labels(self, piece: Piece) -> Ints:
        """Read the classes of a piece: see `ShardReader.labels`."""
        table = self._group(piece, [self._label]).slice(piece.first - piece.base, piece.rows)
        labels = read_labels(table, self._label, str(self.files[piece.shard]), piece.first)
        numbers: Ints = labels.numpy()
        return numbers

    def name(self, piece: Piece, row: int) -> str:
        """Return ``FILE row R``."""
        return f"{self.files[piece.shard]} row {row}"

    def _group(self, piece: Piece, columns: list[str]) -> Any:
        path = self.files[piece.shard]
        try:
            with pq.ParquetFile(path) as file:
                table = file.read_row_group(piece.unit, columns=columns)
        except (*_ARROW_ERRORS, IndexError) as error:
            raise damaged(path, error) from error
        if len(table) < piece.first - piece.base + piece.rows:
            raise UserError(f"{path} has changed since its index was made: start again")
        return table


def shard_columns(files: Sequence[Path]) -> Columns:
    """Find the columns of the first file, and check that the others have the same.

    Raises:
        UserError: a damaged file, or one without these columns; names it.
    """
    first: Columns | None = None
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
        except _ARROW_ERRORS as error:
            raise damaged(path, error) from error
        here = find_columns(schema, str(path))
        first = first or here
        if (here.image, here.label) != (first.image, first.label):
            raise UserError(
                f"{path} has columns {here.image}, {here.label} but {files[0]} has {first.image}, "
                f"{first.label}; all files of a data set must agree"
            )
    assert first is not None
    return first


def index_parquet(reader: ParquetShards, counts: LabelCounts) -> Pieces:
    """Read the footers and the label columns of all shards, one row group at a time.

    Raises:
        UserError: a damaged file, a row group that is too large, a label that is missing or no class number.
    """
    table: list[Piece] = []
    for shard, path in enumerate(reader.files):
        try:
            with pq.ParquetFile(path) as file:
                metadata = file.metadata
        except _ARROW_ERRORS as error:
            raise damaged(path, error) from error
        row = 0
        for unit in range(metadata.num_row_groups):
            group = metadata.row_group(unit)
            if not group.num_rows:
                continue
            _check_group(path, group)
            piece = Piece(shard, unit, row, row, group.num_rows)
            counts.add(reader.labels(piece), lambda n, piece=piece: reader.name(piece, piece.first + n))  # type: ignore[misc]
            table.append(piece)
            row += group.num_rows
    return Pieces(np.array(table, dtype=np.int64).reshape(-1, 5))


def _check_group(path: Path, group: Any) -> None:
    size = sum(group.column(index).total_uncompressed_size for index in range(group.num_columns))
    if size > LARGEST_GROUP:
        raise UserError(
            f"{path} has a row group of {group.num_rows:,} rows and {in_words(size)}; it is read as a "
            f"whole, and {in_words(LARGEST_GROUP)} is the most: write it with a row_group_size of "
            f"{max(group.num_rows * LARGEST_GROUP // (4 * size), 1)}"
        )
