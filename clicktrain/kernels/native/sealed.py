"""Libraries whose names say what is in them: ``KEY.LENGTH.HASH.so``.

A name and its contents appear together, by one rename, so that processes may race and there is no second file
to lose. Damage, whatever its kind, is a library whose name does not fit.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import stat
from pathlib import Path

from clicktrain.formats.atomic import sync_folder

SUFFIX = ".so"


def key_of(*texts: str) -> str:
    """A name for what is built from these texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32]


def store(product: Path, folder: Path, key: str) -> Path:
    """Move a library of the same file system into a folder under its key, once it is on the disk."""
    with open(product, "rb") as file:
        os.fsync(file.fileno())
        data = file.read()
    path = folder / f"{key}.{len(data)}.{_digest(data)}{SUFFIX}"
    if path.is_dir() and not path.is_symlink():
        discard(path)
    os.replace(product, path)
    sync_folder(folder)
    _listing(folder).setdefault(key, []).append(path.name)
    return path


def find(folder: Path, key: str) -> Path | None:
    """An intact library of that key; damaged ones are removed."""
    names = _listing(folder)
    if key not in names:
        names.clear()
        names.update(_scan(folder))
    for name in list(names.get(key, ())):
        if is_intact(folder / name):
            return folder / name
        discard(folder / name)
    return None


def is_intact(path: Path) -> bool:
    """Whether a file is what its name says: a regular one, its length, its hash."""
    try:
        _, length, digest, _ = path.name.split(".")
        # Not by way of a link, and without waiting for the other end of a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode) or facts.st_size != int(length):
                return False
            return _digest(file.read()) == digest
    except (OSError, ValueError):
        return False


def discard(path: Path) -> None:
    """Remove a damaged library, whatever stands in its place; where that is refused, forget it."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    names = _listing(path.parent).get(path.name.partition(".")[0], [])
    if path.name in names:
        names.remove(path.name)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


@functools.cache
def _listing(folder: Path) -> dict[str, list[str]]:
    return _scan(folder)


def _scan(folder: Path) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(folder)):
            if name.endswith(SUFFIX) and name.count(".") == 3:
                names.setdefault(name.partition(".")[0], []).append(name)
    return names
