"""``cifar10:DIR`` and ``cifar100:DIR``: the official archives, binary or python, packed or extracted."""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from clicktrain.data.listing import ListedSplit, Listing
from clicktrain.data.sources.safe_pickle import load_plain_pickle
from clicktrain.errors import UserError, shortened
from clicktrain.files import read_regular

_Array = np.ndarray[Any, Any]
_PIXELS = 3 * 32 * 32
LARGEST_MEMBER = 512 * 2**20
"""Bytes of one file of an archive that is read; the largest of CIFAR has 160 MB."""
LARGEST_ARCHIVE = 2**30
"""Bytes of an archive without its compression; those of CIFAR have 190 MB."""


@dataclass(frozen=True)
class _Layout:
    """File names of one data set in both versions; ``label_bytes`` precede each binary record's pixels."""

    num_classes: int
    binary_folder: str
    python_folder: str
    archives: tuple[str, str]
    binary: tuple[tuple[str, ...], str, str]
    python: tuple[tuple[str, ...], str, str]
    label_bytes: int
    label_key: str
    names_key: str


_LAYOUTS: Mapping[str, _Layout] = {
    "cifar10": _Layout(
        num_classes=10,
        binary_folder="cifar-10-batches-bin",
        python_folder="cifar-10-batches-py",
        archives=("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"),
        binary=(tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin", "batches.meta.txt"),
        python=(tuple(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"),
        label_bytes=1,
        label_key="labels",
        names_key="label_names",
    ),
    "cifar100": _Layout(
        num_classes=100,
        binary_folder="cifar-100-binary",
        python_folder="cifar-100-python",
        archives=("cifar-100-binary.tar.gz", "cifar-100-python.tar.gz"),
        binary=(("train.bin",), "test.bin", "fine_label_names.txt"),
        python=(("train",), "test", "meta"),
        label_bytes=2,  # coarse, fine
        label_key="fine_labels",
        names_key="fine_label_names",
    ),
}


def list_cifar(kind: str, argument: str) -> Listing:
    """Read CIFAR-10 or CIFAR-100 (fine labels); the test split becomes the validation split.

    ``argument`` is the folder with the batch files, a folder that holds the extracted folder or the
    ``.tar.gz``, or the ``.tar.gz`` itself. The binary version is preferred; of the python version, which is
    pickled, only plain data is admitted (see `safe_pickle`). Archives are read in place, nothing is
    extracted.

    Raises:
        UserError: no batches, a batch missing, or a damaged file; names it.
    """
    layout = _LAYOUTS[kind]
    path = Path(argument).expanduser()
    if not path.exists():
        raise UserError(
            f"data {kind}:{argument}: {path} does not exist; give the folder that holds the archive"
        )
    files = _find(path, layout, kind)
    binary = layout.binary[1] in files.names
    train_names, val_name, meta_name = layout.binary if binary else layout.python
    read = _read_binary if binary else _read_python

    def split(names: tuple[str, ...]) -> ListedSplit:
        parts = [read(files.read(name), f"{files.where}/{name}", layout) for name in names]
        images, labels = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts, strict=True))
        return ListedSplit(images, labels)

    classes = _class_names(files, meta_name, layout, binary)
    return Listing(classes, split(train_names), split((val_name,)))


class _Files:
    """The batch files of a folder or of an archive, by their last name."""

    def __init__(self, where: Path, layout: _Layout) -> None:
        self.where = where
        self._contents: dict[str, bytes] | None = None
        if not where.is_dir():
            versions = (layout.binary, layout.python)
            names = frozenset(name for train, test, meta in versions for name in (*train, test, meta))
            self._contents = _read_archive(where, names)
            self.names = frozenset(self._contents)
        else:
            self.names = frozenset(file.name for file in where.iterdir())

    def read(self, name: str) -> bytes:
        if name not in self.names:
            raise UserError(
                f"{self.where} has no {name}; download and extract the whole official archive again"
            )
        if self._contents is not None:
            return self._contents[name]
        try:
            return read_regular(self.where / name, LARGEST_MEMBER)
        except OSError as error:
            raise UserError(
                f"{self.where / name} cannot be read ({error.strerror}); make it readable"
            ) from error


def _read_archive(path: Path, wanted: frozenset[str]) -> dict[str, bytes]:
    """Read the wanted regular members by their last name; nothing is written, no path followed."""
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                if member.offset_data + member.size > LARGEST_ARCHIVE:
                    raise UserError(
                        f"{path} holds more than {LARGEST_ARCHIVE:,} bytes, several times what CIFAR has; "
                        "download it again"
                    )
                name = PurePosixPath(member.name).name
                if not member.isfile() or name not in wanted:
                    continue
                if member.size > LARGEST_MEMBER:
                    raise UserError(
                        f"{path} has {name} of {member.size:,} bytes; up to {LARGEST_MEMBER:,} are read"
                    )
                file = archive.extractfile(member)
                assert file is not None  # it is a regular file
                contents[name] = file.read()
    except UserError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        reason = shortened(str(error).partition("\n")[0], 100)
        raise UserError(f"{path} is not a whole .tar.gz archive ({reason}); download it again") from error
    return contents


def _find(path: Path, layout: _Layout, kind: str) -> _Files:
    """Find the batches: binary before python, extracted before packed."""
    if path.is_file():
        files = _Files(path, layout)
        if layout.binary[1] in files.names or layout.python[1] in files.names:
            return files
        raise UserError(f"{path} holds no {kind} batches; one of {', '.join(layout.archives)} does")
    folders = (layout.binary_folder, layout.python_folder)
    tests = (layout.binary[1], layout.python[1])
    for folder, test_name, archive in zip(folders, tests, layout.archives, strict=True):
        for candidate in (path, path / folder):
            if (candidate / test_name).is_file():
                return _Files(candidate, layout)
        if (path / archive).is_file():
            return _Files(path / archive, layout)
    raise UserError(
        f"{path} holds no {kind} data; put {' or '.join(layout.archives)} there, or the folder "
        f"{layout.binary_folder} or {layout.python_folder} extracted from it"
    )


def _read_binary(data: bytes, name: str, layout: _Layout) -> tuple[_Array, _Array]:
    record = layout.label_bytes + _PIXELS
    if not data or len(data) % record:
        raise UserError(
            f"{name} has {len(data)} bytes, which is no whole number of {record}-byte images; download it "
            "again"
        )
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, record)
    pixels = records[:, layout.label_bytes :].reshape(-1, 3, 32, 32)
    return pixels.copy(), records[:, layout.label_bytes - 1].astype(np.int64)


def _read_python(data: bytes, name: str, layout: _Layout) -> tuple[_Array, _Array]:
    batch = load_plain_pickle(data, name)
    pixels, labels = batch.get("data"), batch.get(layout.label_key)
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.ndim != 2
        or pixels.shape[1] != _PIXELS
        or not isinstance(labels, list)
        or len(labels) != len(pixels)
        or not all(isinstance(label, int) for label in labels)
    ):
        raise UserError(
            f"{name} is not a CIFAR batch: it needs data (images of {_PIXELS} bytes) and as many "
            f"{layout.label_key}; download the official archive again"
        )
    return pixels.reshape(-1, 3, 32, 32).copy(), np.array(labels, dtype=np.int64)


def _class_names(files: _Files, meta_name: str, layout: _Layout, binary: bool) -> tuple[str, ...]:
    """Read the class names; without their file, or with another number of names, classes are numbered."""
    names: list[str] = []
    if meta_name in files.names:
        content = files.read(meta_name)
        if binary:
            names = content.decode(errors="replace").split()
        else:
            raw = load_plain_pickle(content, f"{files.where}/{meta_name}").get(layout.names_key, [])
            names = [name.decode(errors="replace") if isinstance(name, bytes) else str(name) for name in raw]
    return tuple(names) if len(names) == layout.num_classes else tuple(map(str, range(layout.num_classes)))
