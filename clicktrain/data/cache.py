"""Decoded pixels on disk, so that a data set is decoded once and not at every start."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.files import cache_folder
from clicktrain.leftovers import remove_abandoned
from clicktrain.limits import in_words

FORMAT_VERSION = 2
_SPARE_BYTES = 64 * 2**20  # left free beside what is written
logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """``clicktrain`` in the user's cache; UserError where the user has no home folder."""
    folder = cache_folder()
    if folder is None:
        raise UserError("there is no home folder to keep decoded images in: set XDG_CACHE_HOME to a folder")
    return folder


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise UserError, with the space that is needed and free, unless a file fits."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(existing).free, needed_bytes + _SPARE_BYTES
    if free < needed:
        raise UserError(
            f"{what} needs {in_words(needed)} in {folder} but {in_words(free)} are free; "
            "free some space or set cache_dir to a larger disk"
        )


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; it takes the name ``path`` when the block ends well.

    Whatever happens, ``path`` is either absent, the old file or the whole new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, r"\..+\.(?P<pid>\d+)\.tmp")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def content_key(*parts: object) -> str:
    """Return a short name for content that is described by ``parts`` (anything that JSON holds)."""
    text = json.dumps([FORMAT_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def files_fingerprint(paths: list[Path]) -> str:
    """Return a text that changes with the name, size or time of change of any of these files."""
    digest = hashlib.sha256()
    for path in paths:
        status = path.stat()
        digest.update(
            f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()


@dataclass(frozen=True)
class PixelCache:
    """A folder of safetensors files, one per content key, each with the checksums of its tensors."""

    folder: Path

    def path(self, key: str) -> Path:
        """Return where the tensors of this key are or would be."""
        return self.folder / f"{key}.safetensors"

    def load(self, key: str | None) -> dict[str, Tensor] | None:
        """Return the tensors of this key, or None where there are none or the file is damaged."""
        if key is None:
            return None
        path = self.path(key)
        try:
            if not path.is_file():
                return None
            with safe_open(path, framework="pt") as file:
                checksums = json.loads((file.metadata() or {})["crc32"])
                names = list(file.keys())
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
            if checksums != {name: _checksum(tensor) for name, tensor in tensors.items()}:
                raise ValueError("a checksum differs")
        except Exception as error:  # a damaged file is worth no more than a missing one
            logger.warning("the cache file %s is damaged (%s) and is made again", path, error)
            return None
        return tensors

    def store(self, key: str | None, tensors: dict[str, Tensor]) -> None:
        """Write the tensors, whole or not at all; where the folder cannot be written, warn and go on.

        Nothing without a key. UserError where the disk has too little space.
        """
        if key is None:
            return
        needed = sum(tensor.nbytes for tensor in tensors.values())
        metadata = {"crc32": json.dumps({name: _checksum(tensor) for name, tensor in tensors.items()})}
        try:
            require_space(self.folder, needed, "the cache of the decoded images")
            with atomic_path(self.path(key)) as temporary:
                save_file(tensors, temporary, metadata)
        except UserError:
            raise
        except Exception as error:  # safetensors wraps the system's errors in its own type
            message = "the cache folder %s cannot be written (%s): images will be decoded again next time"
            logger.warning(message, self.folder, error)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().numpy().data)
