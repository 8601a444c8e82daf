"""Atomic files (temporary file, fsync, rename), and logs of whole lines."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from clicktrain.errors import UserError
from clicktrain.leftovers import process_runs

_TEMPORARY = re.compile(r"\..+\.(?P<pid>\d+)-[0-9a-f]{8}\.tmp")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def replace_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that replaces ``path`` once it is whole and on the disk.

    Until then, and if the block raises, an older file of that name stays as it was.

    Raises:
        UserError: the disk is full or a quota is used up.
        OSError: anything else that the file system refuses.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with _clear_disk_full(target):
        try:
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException as error:
            if isinstance(error, OSError) and error.filename == str(temporary):
                error.filename = str(target)  # nobody knows the other name
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    sync_folder(target.parent)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file whole or not at all; errors as `replace_file`."""
    with replace_file(path) as file:
        file.write(text.encode("utf-8"))


def append_jsonl(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Add one line of JSON to a log and bring it to the disk.

    A last line without newline (its writer was killed) is cut off first. NaN and infinities, which JSON does
    not have, are written as null.

    Raises:
        UserError: the disk is full; the log then is as before.
        TypeError: the record holds something that JSON does not know.
    """
    line = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
    with _clear_disk_full(Path(path)), open(path, "a+b", buffering=0) as file:
        end = _cut_unfinished_line(file)
        try:
            written = file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def is_leftover(path: Path) -> bool:
    """Whether this is a temporary file of `replace_file` whose writer no longer runs on this machine."""
    match = _TEMPORARY.fullmatch(path.name)
    return match is not None and not process_runs(int(match["pid"]))


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files that killed writers left in a folder; those of running ones stay."""
    for path in Path(folder).glob(".*.tmp"):
        if is_leftover(path):
            path.unlink(missing_ok=True)


def _cut_unfinished_line(file: Any) -> int:
    """Truncate to the last newline; return the new length in bytes."""
    end = file.seek(0, os.SEEK_END)
    position, step = end, 4096
    while position > 0:
        start = max(0, position - step)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            position = start + newline + 1
            break
        position = start
    if position != end:
        file.truncate(position)
    return int(position)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@contextlib.contextmanager
def _clear_disk_full(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise UserError(
                f"no space left on the disk while writing {path}: free some space or write elsewhere"
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Flush a rename to the disk, where the system can (Windows cannot open a folder)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
