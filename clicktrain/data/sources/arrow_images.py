"""Images in the columns of Parquet and Arrow files, as Hugging Face data sets keep them."""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from clicktrain.data.image_files import LARGEST_FILE
from clicktrain.errors import UserError, shortened, shown
from clicktrain.files import read_regular

Form = Literal["parquet", "arrow-file", "arrow-stream"]
_IMAGE_NAMES = ("image", "img", "jpg", "png")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")


@dataclass(frozen=True)
class Columns:
    """Which columns hold the images and the labels, and the class names if the schema has them."""

    image: str
    label: str
    classes: tuple[str, ...] | None


def find_columns(schema: Any, where: str) -> Columns:
    """Find the image and the label column of an Arrow schema.

    Types decide: Hugging Face's Image and ClassLabel where the schema's metadata names them, otherwise a
    struct with ``bytes`` (or plain bytes) and an integer. Of several, the one with a usual name is taken.

    Raises:
        UserError: none, or several of which none has a usual name; lists the columns.
    """
    features = _hub_features(schema)
    by_feature = {
        kind: [n for n, f in features.items() if f.get("_type") == kind] for kind in ("Image", "ClassLabel")
    }
    images = by_feature["Image"] or [field.name for field in schema if _holds_bytes(field.type)]
    labels = by_feature["ClassLabel"] or [field.name for field in schema if pa.types.is_integer(field.type)]
    listed = shortened(", ".join(f"{field.name}: {_short(field.type)}" for field in schema) or "none", 160)
    problem = f"{where} has no single image column (struct of bytes and path, or bytes)"
    image = _choose(images, _IMAGE_NAMES, problem, listed)
    label = _choose(labels, _LABEL_NAMES, f"{where} has no single label column (integers)", listed)
    names = features.get(label, {}).get("names")
    if names is not None and not isinstance(names, list):
        raise UserError(f"{where} names the classes of {label} as {shown(names)}; a list of names is needed")
    return Columns(image, label, tuple(str(name) for name in names) if names else None)


def _hub_features(schema: Any) -> dict[str, dict[str, Any]]:
    """Read Hugging Face's description of the columns, or nothing where there is none that can be read."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        known = set(schema.names)
        return {
            name: feature for name, feature in features.items() if name in known and isinstance(feature, dict)
        }
    except (KeyError, TypeError, AttributeError, ValueError):
        return {}


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _short(kind: Any) -> str:
    return "struct" if pa.types.is_struct(kind) else str(kind)


def _choose(candidates: list[str], usual: tuple[str, ...], problem: str, listed: str) -> str:
    for name in usual:
        if name in candidates:
            return name
    if len(candidates) != 1:
        raise UserError(f"{problem}; its columns are {listed}, and {usual[0]!r} is the usual name")
    return candidates[0]


def read_labels(table: Any, column: str, where: str, first_row: int = 0) -> Tensor:
    """Turn the label column of one file's table into int64 [N]; it begins at ``first_row`` of the file.

    Raises:
        UserError: no integers, or a row without a label; names ``where`` and the row.
    """
    values = table.column(column)
    if not pa.types.is_integer(values.type):
        raise UserError(
            f"{where}: label column {column!r} holds {values.type}; integers from 0 on are needed"
        )
    if values.null_count:
        row = first_row + values.is_null().to_pylist().index(True)
        raise UserError(f"{where} row {row} has no label (null); give it one or remove the row")
    try:
        return torch.tensor(values.cast(pa.int64()).to_numpy(), dtype=torch.int64)
    except pa.ArrowException:  # unsigned, and beyond what a class number can be
        largest = pc.max(values).as_py()
        raise UserError(f"{where} has label {largest}; labels are class numbers that count from 0") from None


def damaged(path: Path, error: Exception) -> UserError:
    """Return the error for a file that Arrow cannot read."""
    reason = shortened((str(error).splitlines() or [type(error).__name__])[0], 150)
    return UserError(f"{path} is not a whole {path.suffix[1:]} file ({reason}); get it again")


def open_table(path: Path, form: Form, columns: list[str]) -> Any:
    """Read columns of one file; Arrow files are mapped into memory, not read.

    Raises:
        UserError: a damaged file; names it.
    """
    try:
        if form == "parquet":
            return pq.ParquetFile(path).read(columns=columns)
        opener = pa.ipc.open_file if form == "arrow-file" else pa.ipc.open_stream
        return opener(pa.memory_map(str(path))).read_all().select(columns)
    except (pa.ArrowException, OSError, OverflowError, KeyError) as error:
        raise damaged(path, error) from error


def file_bytes(value: Any, name: Callable[[], str]) -> bytes:
    """Return the bytes of an image file from a row's value; one that holds only a path is read from there.

    Raises:
        UserError: no image, or a path that cannot be read; ``name`` says what a message calls the row.
    """
    path = None
    if isinstance(value, dict):
        path, value = value.get("path"), value.get("bytes")
    if value is None and path is not None:
        try:
            return read_regular(path, LARGEST_FILE)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the path, or no regular file
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(
                f"{name()} holds only the path {shortened(path, 300)}, which cannot be read "
                f"({reason}); the column must hold the bytes of the images"
            ) from error
    if value is None:
        raise UserError(f"{name()} has no image (null); give it one or remove the row")
    return bytes(value)


class ArrowImages:
    """The image column of several files, joined.

    Opened at the first read, and again in each worker process that receives a copy. ``rows`` are pairs (what
    messages call a run of rows, how many they are), in the order of the files.
    """

    def __init__(
        self, files: Sequence[Path], form: Form, column: str, rows: Sequence[tuple[str, int]]
    ) -> None:
        self._files, self._form, self._column = tuple(files), form, column
        starts = [0, *itertools.accumulate(count for _, count in rows)]
        self._length = starts.pop()
        self._first_rows = [(name, start) for (name, _), start in zip(rows, starts, strict=True)]
        self._chunks: list[Any] | None = None
        self._chunk_starts: list[int] = []

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chunks": None, "_chunk_starts": []}

    def name(self, index: int) -> str:
        """Return ``FILE row R``."""
        at = bisect.bisect_right([first for _, first in self._first_rows], index) - 1
        name, first = self._first_rows[at]
        return f"{name} row {index - first}"

    def read(self, index: int) -> bytes:
        """Return the bytes of one image file; a row that holds only a path is read from there."""
        if self._chunks is None:
            self._open()
        assert self._chunks is not None
        at = bisect.bisect_right(self._chunk_starts, index) - 1
        value: Any = self._chunks[at][index - self._chunk_starts[at]].as_py()
        return file_bytes(value, lambda: self.name(index))

    def _open(self) -> None:
        columns = [open_table(file, self._form, [self._column]).column(self._column) for file in self._files]
        chunks = [chunk for column in columns for chunk in column.chunks if len(chunk)]
        starts = [0, *itertools.accumulate(len(chunk) for chunk in chunks)]
        if starts.pop() != self._length:
            raise UserError(f"{self._files[0]} and its shards changed while they were read; start again")
        self._chunk_starts = starts
        self._chunks = chunks
