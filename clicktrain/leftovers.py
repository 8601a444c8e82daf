"""What killed processes leave behind: temporary files and folders that have their process in the name."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from pathlib import Path

ABANDONED_SECONDS = 3600.0
"""Age from which a temporary file in a folder that machines may share is nobody's: its process may run on
another one."""


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

    Args:
        folder: which other processes, also of other machines, may be writing to.
        name: regular expression of the whole name, whose group ``pid`` is the process.
    """
    with contextlib.suppress(OSError):  # gone in between, or not ours to remove
        for path in folder.iterdir():
            match = re.fullmatch(name, path.name)
            if match is None or process_runs(int(match["pid"])):
                continue
            if time.time() - path.lstat().st_mtime < ABANDONED_SECONDS:
                continue
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
