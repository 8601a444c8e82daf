"""Removes temporary files and folders of killed processes; their names hold the process number."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from pathlib import Path

ABANDONED_SECONDS = 3600.0
"""Age from which a temporary file counts as abandoned in a folder that several machines may share."""


def process_runs(pid: int) -> bool:
    """Whether another process of this number runs on this machine."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # not ours to signal: it runs
    return True


def remove_abandoned(folder: Path, name: str) -> None:
    """Remove temporary files and folders whose process is gone and that have not changed for an hour.

    Processes of other machines may be writing to the folder too. ``name`` is a regular expression of the
    whole name, whose group ``pid`` is the process.
    """
    with contextlib.suppress(OSError):  # removed in between, or by permission not ours
        for path in folder.iterdir():
            match = re.fullmatch(name, path.name)
            if match is None or process_runs(int(match["pid"])):
                continue
            if time.time() - path.lstat().st_mtime < ABANDONED_SECONDS:
                continue
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
