"""The folder of a run before its first checkpoint: whether it is free, and how it is removed again."""

from __future__ import annotations

import shutil
from pathlib import Path

from clicktrain.errors import UserError
from clicktrain.formats.atomic import is_leftover
from clicktrain.runs.format import HEADER
from clicktrain.runs.lock import LOCK_NAME

LOGS = ("metrics.jsonl", "events.jsonl")
"""Files that are created with the folder."""
CHECKPOINTS = "checkpoints"


def exists(path: Path) -> bool:
    """Whether there is anything at a path; UserError for an impossible path (too long, a loop of links)."""
    try:
        path.lstat()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{_shown(path)} cannot be the folder of a run: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{_shown(path)!r} cannot be the folder of a run: {error}") from None
    return True


def only_begun(path: Path) -> bool:
    """Whether a folder holds only what `RunFolder.create` writes before the first checkpoint.

    A process that is killed while it starts a run leaves such a folder, with nothing of value. A config.yaml
    counts only if a run wrote it together with the other files.
    """
    names = {entry.name for entry in path.iterdir() if not is_leftover(entry)} - {LOCK_NAME}
    if not names <= {CHECKPOINTS, *LOGS, "config.yaml"}:
        return False
    if CHECKPOINTS in names and not _empty_folder(path / CHECKPOINTS):
        return False
    if _size(path / LOGS[0]) > 0:
        return False  # an epoch was trained
    if "config.yaml" in names:
        return names >= {CHECKPOINTS, *LOGS} and _written_by_a_run(path / "config.yaml")
    return _size(path / LOGS[1]) == 0


def clear_begun(path: Path) -> None:
    """Remove the contents of an `only_begun` folder except the lock."""
    for entry in path.iterdir():
        if entry.name == CHECKPOINTS:
            shutil.rmtree(entry)
        elif entry.name != LOCK_NAME:
            entry.unlink()


def existing_part(path: Path) -> Path:
    """The nearest folder above (or at) ``path`` that exists."""
    path = path.absolute()
    while not exists(path):
        path = path.parent
    return path


def remove_new(path: Path, there: Path) -> None:
    """Remove what was created at ``path``; ``there`` is the part of it that existed before."""
    path = path.absolute()
    if path == there:
        for child in path.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        return
    shutil.rmtree(path, ignore_errors=True)
    for folder in path.parents:
        if folder == there or not _removed(folder):  # another run may have been made beside it
            return


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return False
    return True


def _empty_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and all(is_leftover(entry) for entry in path.iterdir())


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _written_by_a_run(config: Path) -> bool:
    with config.open("rb") as file:
        return file.read(len(HEADER)) == HEADER.encode()


def _shown(path: Path) -> str:
    """A path, shortened to fit a line."""
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-60:]} ({len(text)} characters)"
