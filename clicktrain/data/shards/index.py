"""The index of a set of shards: how many samples they have, in which pieces, of which classes; made once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from clicktrain.data.cache import PixelCache, atomic_path, content_key, files_fingerprint
from clicktrain.data.shards.find import find_shards
from clicktrain.data.shards.source import LabelCounts, Pieces, ShardReader
from clicktrain.errors import UserError
from clicktrain.files import read_text

CLASSES = "classes.txt"
SHARD_KINDS = {"parquet-shards": ".parquet", "webdataset": ".tar"}
"""Kinds of specifications that stream shards, and their files' suffix."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class IndexedSplit:
    """One split: its reader, its pieces, and the images of each class, int64 [classes]."""

    reader: ShardReader
    pieces: Pieces
    class_counts: Tensor


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """A data set in shards; ``key`` is its name in the cache."""

    classes: tuple[str, ...]
    train: IndexedSplit
    val: IndexedSplit | None
    key: str


def index_shards(kind: str, argument: str, cache: PixelCache) -> ShardIndex:
    """Find the shards of a folder, and read their index from the cache or make it now.

    Names of classes are those of a Parquet schema, or the lines of ``classes.txt`` beside tar files.

    Raises:
        UserError: no shards, a damaged shard, a sample without an image or label, fewer than two classes;
            names the shard and the sample.
    """
    spec, root = f"{kind}:{argument}", Path(argument).expanduser()
    _refuse_compressed(kind, root)
    splits = find_shards(root, SHARD_KINDS[kind], spec)
    files = [path for paths in splits.values() for path in paths]
    names = _tar_classes(root) if kind == "webdataset" else None
    if kind == "parquet-shards":
        from clicktrain.data.shards.parquet import shard_columns

        names = shard_columns(files).classes
    key = f"{kind}-{content_key(files_fingerprint(files), list(splits), names and len(names))}"
    found = _cached(kind, splits, cache, key)
    if found is None:
        with _one_at_a_time(cache.folder / f"{key}.lock"):  # others find what the first one has made
            found = _cached(kind, splits, cache, key)
            if found is None:
                logger.info("reading the index of the %d shards of %s, once", len(files), spec)
                found = _make(kind, splits, cache, key, names, spec)
    train, val = found["train"], found.get("val")
    classes = names or tuple(map(str, range(len(train.class_counts))))
    _check_classes(train, val, classes, spec)
    return ShardIndex(classes, train, val, key)


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Let processes take turns at the block; where nothing can be locked, all of them do it."""
    with contextlib.ExitStack() as stack:
        try:
            import fcntl

            path.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(path.open("a")), fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


def _refuse_compressed(kind: str, root: Path) -> None:
    if kind != "webdataset" or not root.is_dir():
        return
    packed = next((path for path in sorted(root.iterdir()) if path.name.endswith((".tar.gz", ".tgz"))), None)
    if packed is not None:
        raise UserError(
            f"{packed} is compressed as a whole, so that no sample can be read without those before it: "
            f"unpack it to a .tar (gunzip)"
        )


def _tar_classes(root: Path) -> tuple[str, ...] | None:
    path = root / CLASSES
    if not path.is_file():
        return None
    return tuple(line.strip() for line in read_text(path).splitlines() if line.strip())


def _samples_file(cache: PixelCache, key: str) -> Path:
    return cache.folder / f"{key}.samples"


def _reader(kind: str, files: list[Path], cache: PixelCache, key: str) -> ShardReader:
    """Make the reader; libraries of a kind are imported here."""
    if kind == "parquet-shards":
        from clicktrain.data.shards.parquet import ParquetShards, shard_columns

        return ParquetShards(files, shard_columns(files[:1]))
    from clicktrain.data.shards.tar import TarShards

    return TarShards(files, _samples_file(cache, key))


def _cached(
    kind: str, splits: dict[str, list[Path]], cache: PixelCache, key: str
) -> dict[str, IndexedSplit] | None:
    """The index in the cache, if it is there and whole."""
    tensors = cache.load(key)
    if tensors is None or tensors.keys() != {f"{name} {part}" for name in splits for part in _PARTS}:
        return None
    found = {
        name: IndexedSplit(
            _reader(kind, files, cache, key),
            Pieces(tensors[f"{name} pieces"].numpy()),
            tensors[f"{name} class counts"],
        )
        for name, files in splits.items()
    }
    if kind == "webdataset":
        from clicktrain.data.shards.tar import samples_in

        if samples_in(_samples_file(cache, key)) != sum(split.pieces.samples for split in found.values()):
            return None
    return found


_PARTS = ("pieces", "class counts")


def _make(
    kind: str,
    splits: dict[str, list[Path]],
    cache: PixelCache,
    key: str,
    names: tuple[str, ...] | None,
    spec: str,
) -> dict[str, IndexedSplit]:
    """Make the index and put it into the cache."""
    counts = {name: LabelCounts(None if names is None else len(names)) for name in splits}
    pieces: dict[str, Pieces] = {}
    if kind == "parquet-shards":
        from clicktrain.data.shards.parquet import ParquetShards, index_parquet, shard_columns

        for name, files in splits.items():
            pieces[name] = index_parquet(ParquetShards(files, shard_columns(files)), counts[name])
    else:
        from clicktrain.data.shards.tar import index_tar

        with _writing(_samples_file(cache, key), spec) as out:
            for name, files in splits.items():
                base = sum(split.samples for split in pieces.values())
                pieces[name] = index_tar(files, out, counts[name], base)
    total = pieces["train"].samples
    for name, split in pieces.items():
        if not split.samples:
            what = "training" if name == "train" else "validation"
            raise UserError(f"data {spec!r} is empty: it holds no {what} images")
        largest = len(counts[name].counts) - 1
        if names is None and largest >= max(total, 2):
            raise UserError(
                f"data {spec!r}: {counts[name].largest} has label {largest}, more than there are training "
                "images; labels are class numbers that count from 0"
            )
    classes = max(len(count.counts) for count in counts.values())
    tensors: dict[str, Tensor] = {}
    for name in splits:
        tensors[f"{name} pieces"] = torch.from_numpy(pieces[name].table)
        padded = np.pad(counts[name].counts, (0, classes - len(counts[name].counts)))
        tensors[f"{name} class counts"] = torch.from_numpy(padded)
    cache.store(key, tensors)
    return {
        name: IndexedSplit(_reader(kind, files, cache, key), pieces[name], tensors[f"{name} class counts"])
        for name, files in splits.items()
    }


@contextlib.contextmanager
def _writing(path: Path, spec: str) -> Iterator[IO[bytes]]:
    """Give a file that takes its name when the block ends well; UserError where it cannot be written."""
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as out:
            yield out
            out.close()  # before it takes its name
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written ({error.strerror}), but the index of {spec} is kept there; set "
            "cache_dir to a folder that can be written"
        ) from error


def _check_classes(
    train: IndexedSplit, val: IndexedSplit | None, classes: tuple[str, ...], spec: str
) -> None:
    trained = train.class_counts > 0
    if len(classes) < 2 or int(trained.sum()) < 2:
        only = classes[int(train.class_counts.argmax())]
        raise UserError(
            f"data {spec!r} has training images of one class only ({only!r}); at least two classes are needed"
        )
    if val is not None and bool((val.class_counts[~trained] > 0).any()):
        unknown = int(((val.class_counts > 0) & ~trained).nonzero()[0])
        raise UserError(
            f"data {spec!r}: class {classes[unknown]!r} has validation images but no training images; add "
            "some or remove it from the validation split"
        )
