"""``webdataset:DIR``: tar files whose neighboring members of one name make a sample, as webdataset has them.

Python's ``tarfile`` reads them, once, for an index of where images lie; from then on they are read by offset.
The webdataset package reads tar files from the beginning to the end only and shuffles in each worker for
itself, so that an epoch can neither begin in the middle nor be the same for another number of workers.
"""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from clicktrain.data.image_files import LARGEST_FILE
from clicktrain.data.shards.source import Ints, LabelCounts, Piece, Pieces, Sample
from clicktrain.errors import UserError, shortened, shown
from clicktrain.files import parse_json

PIECE = 256
"""Most samples of a piece."""
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "gif", "tif", "tiff")
LABELS = ("cls", "class", "label")
_LARGEST_LABEL = 2**20
_BLOCK = 512
_COLUMNS = 3  # offset, size, class
_BYTES = 8 * _COLUMNS


@dataclass
class _Grouped:
    """The members of one sample: the image's place and what says its class."""

    key: str
    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    labels: dict[str, bytes] = field(default_factory=dict)


class TarShards:
    """Reads samples of tar files by an index: a file of int64 rows (offset of an image, its size, its class).

    See `index_tar`.
    """

    def __init__(self, files: Sequence[Path], index: Path) -> None:
        self.files = tuple(files)
        self._index = index

    def read(self, piece: Piece, rows: Sequence[int]) -> list[Sample]:
        """Read some samples of a shard: see `ShardReader.read`."""
        path = self.files[piece.shard]
        entries = self._entries(piece)[np.asarray(rows, dtype=np.int64) - piece.first]
        samples = []
        try:
            with path.open("rb") as file:
                for row, (offset, size, label) in zip(rows, entries.tolist(), strict=True):
                    file.seek(offset)
                    data = file.read(size)
                    if len(data) < size:
                        raise UserError(
                            f"{path} ends inside of sample {row}: it has changed since its index was made; "
                            "start again"
                        )
                    samples.append(Sample(data, label))
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); get it again") from error
        return samples

    def labels(self, piece: Piece) -> Ints:
        """Read the classes of a piece from the index: see `ShardReader.labels`."""
        labels: Ints = self._entries(piece)[:, 2]
        return labels

    def name(self, piece: Piece, row: int) -> str:
        """Return ``FILE sample KEY``; the key is in the image's header, up to 100 characters of it."""
        path = self.files[piece.shard]
        offset = int(self._entries(piece)[row - piece.first, 0])
        try:
            with path.open("rb") as file:
                file.seek(offset - _BLOCK)
                header = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape")
        except (tarfile.TarError, OSError):
            return f"{path} sample number {row}"  # all that a damaged file leaves
        return f"{path} sample {_key_and_kind(header.name)[0]}"

    def _entries(self, piece: Piece) -> Ints:
        first = piece.base + piece.first
        entries: Ints = np.fromfile(self._index, np.int64, _COLUMNS * piece.rows, offset=_BYTES * first)
        if len(entries) < _COLUMNS * piece.rows:
            raise UserError(f"{self._index} is damaged: remove it, and it is made again")
        return entries.reshape(-1, _COLUMNS)


def index_tar(files: Sequence[Path], out: IO[bytes], counts: LabelCounts, base: int) -> Pieces:
    """Read the headers and labels of all shards, and write where images lie.

    Args:
        out: takes int64 rows: offset, size, class.
        base: rows that were written to it before.

    Raises:
        UserError: a file is damaged, or a sample has no image, no label or several; names both.
    """
    table: list[Piece] = []
    for shard, path in enumerate(files):
        samples, first = _samples(path), 0
        while piece := list(itertools.islice(samples, PIECE)):
            rows = [(*_image_of(sample, path), _label_of(sample, path)) for sample in piece]
            entries = np.array(rows, dtype=np.int64)
            keys = [sample.key for sample in piece]
            counts.add(entries[:, 2], lambda n, path=path, keys=keys: f"{path} sample {keys[n]}")  # type: ignore[misc]
            out.write(entries.tobytes())
            table.append(Piece(shard, 0, base, first, len(piece)))
            first += len(piece)
        base += first
    return Pieces(np.array(table, dtype=np.int64).reshape(-1, 5))


def _samples(path: Path) -> Iterator[_Grouped]:
    """Yield the samples of a tar file: neighboring members whose names agree up to the first dot."""
    current: _Grouped | None = None
    end = 0
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined] # it would keep them all
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK if member.isreg() else 0
                end = end or member.offset_data
                if member.name.rpartition("/")[2].startswith((".", "__")) or member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(f"{path} member {shown(member.name, 200)} is no regular file: remove it")
                key, kind = _key_and_kind(member.name)
                if current is None or current.key != key:
                    if current is not None:
                        yield current
                    current = _Grouped(key)
                _add(current, kind, member, tar, path)
            _check_end(file, end, path, current)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise _damaged(path, str(error), current) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable") from error
    if current is not None:
        yield current


def _key_and_kind(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, kind = last.partition(".")
    return folder + slash + stem, kind.lower()


def _add(sample: _Grouped, kind: str, member: tarfile.TarInfo, tar: tarfile.TarFile, path: Path) -> None:
    """Note a member where it is an image or says the class; others (texts, boxes) are passed over."""
    where = f"{path} sample {sample.key}"
    if kind in sample.images or kind in sample.labels:
        raise UserError(f"{where} has two members .{kind}: names of samples must differ up to the first dot")
    if kind in IMAGES:
        if member.size > LARGEST_FILE:
            raise UserError(
                f"{where} has {member.size:,} bytes: images are read up to {LARGEST_FILE:,} bytes"
            )
        sample.images[kind] = (member.offset_data, member.size)
    elif kind in (*LABELS, "json"):
        if member.size > _LARGEST_LABEL:
            raise UserError(f"{where} has a .{kind} of {member.size:,} bytes, which is no class number")
        content = tar.extractfile(member)
        assert content is not None  # a regular file
        sample.labels[kind] = content.read()


def _check_end(file: IO[bytes], end: int, path: Path, last: _Grouped | None) -> None:
    """Raise a UserError unless zeros follow the last member: `tarfile` stops silently at damaged headers."""
    file.seek(end)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK or any(block):
        what = "a damaged header" if any(block) else "no end mark: it is cut short"
        raise _damaged(path, f"byte {end:,}: {what}", last)


def _damaged(path: Path, reason: str, last: _Grouped | None) -> UserError:
    where = f" after sample {last.key}" if last is not None else ""
    return UserError(f"{path} is not a whole tar file ({shortened(reason, 100)}{where}); get it again")


def _image_of(sample: _Grouped, path: Path) -> tuple[int, int]:
    """Offset and size of the image."""
    if len(sample.images) != 1:
        kinds = ", ".join(f".{kind}" for kind in sample.images or IMAGES)
        has = "several images" if sample.images else "no image"
        raise UserError(f"{path} sample {sample.key} has {has} ({kinds}); one is needed")
    return next(iter(sample.images.values()))


def _label_of(sample: _Grouped, path: Path) -> int:
    """The class: a number in ``.cls`` (or ``.class``, ``.label``), or ``label`` or ``cls`` in ``.json``."""
    where = f"{path} sample {sample.key}"
    kind = next((kind for kind in LABELS if kind in sample.labels), None)
    value: object = None
    if kind is not None:
        value = sample.labels[kind].decode("ascii", errors="replace").strip()
    elif "json" in sample.labels:
        fields = parse_json(sample.labels["json"], f"{where} has a .json that is not JSON")
        if isinstance(fields, dict):
            value = next((fields[name] for name in ("label", "cls") if name in fields), None)
    if value is None:
        raise UserError(f"{where} has no label: a member .cls with its class number, or a label in .json")
    text = str(value)
    if isinstance(value, bool) or len(text) > 18 or not text.removeprefix("-").isdecimal():
        raise UserError(f"{where} has label {shown(value)}; class numbers that count from 0 are needed")
    return int(text)


def samples_in(index: Path) -> int | None:
    """Return the number of samples of an index file, or None where there is none that is whole."""
    try:
        rows, rest = divmod(index.stat().st_size, _BYTES)
    except OSError:
        return None
    return rows if not rest else None
