"""Cuts the logs of a run back to a checkpoint, and mends those that were changed since."""

from __future__ import annotations

import contextlib
import itertools
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clicktrain.files import LARGEST_TEXT, read_regular
from clicktrain.formats.atomic import write_text_atomic

_PIECE = 2**20


@dataclass(frozen=True, slots=True)
class LogMark:
    """The state of a log at a checkpoint: its bytes, and their CRC-32."""

    num_bytes: int = 0
    crc32: int = 0

    @classmethod
    def of(cls, path: Path, num_bytes: int | None = None) -> LogMark:
        """The mark of a file, or of its first ``num_bytes``; an empty one if there is no file."""
        if not path.exists():
            return cls()
        left = path.stat().st_size if num_bytes is None else num_bytes
        size = crc = 0
        with path.open("rb") as file:
            while left > 0 and (piece := file.read(min(left, _PIECE))):
                crc, size, left = zlib.crc32(piece, crc), size + len(piece), left - len(piece)
        return cls(size, crc)


@dataclass(frozen=True, slots=True)
class Mended:
    """A log that was changed since the checkpoint."""

    path: Path
    lines: int
    """Number of readable lines that were kept."""
    aside: Path | None
    """New name of the changed file; None if it was missing."""

    def __str__(self) -> str:
        problem = (
            f"{self.path} is gone"
            if self.aside is None
            else f"{self.path} was cut or changed since the checkpoint; as it was found it is now "
            f"{self.aside.name}"
        )
        return (
            f"{problem}: {self.lines} of its lines stay, and training goes on (weights do not depend on logs)"
        )


def take_back(path: Path, mark: LogMark, belongs: Callable[[dict[str, Any]], bool]) -> Mended | None:
    """Cut a log back to what it was at a checkpoint, by its mark; what was mended, or None.

    If its beginning has changed, every whole line of JSON that ``belongs`` before the checkpoint stays, and
    the changed file is put aside. A missing log is created if it was there.
    """
    if LogMark.of(path, mark.num_bytes) == mark:
        if path.exists():
            with path.open("r+b") as file:
                file.truncate(mark.num_bytes)
        return None
    aside = _put_aside(path) if path.exists() else None
    lines = [] if aside is None else [line for line in _readable(aside) if belongs(line)]
    write_text_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return Mended(path, len(lines), aside)


def _put_aside(path: Path) -> Path:
    names = (path.with_name(f"{path.stem}.damaged-{number}{path.suffix}") for number in itertools.count(1))
    return path.rename(next(aside for aside in names if not aside.exists()))


def _readable(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in read_regular(path, LARGEST_TEXT).split(b"\n")[:-1]:
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]
