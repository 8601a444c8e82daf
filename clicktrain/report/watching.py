"""A report that is written again whenever one of its runs has moved on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from clicktrain.errors import UserError
from clicktrain.report.page import write_report
from clicktrain.runs.folder import RunFolder
from clicktrain.runs.lock import holder

LOOK_SECONDS = 0.5
"""Between two looks at the folders."""


def watch_report(
    run_paths: Sequence[str | Path],
    output: str | Path,
    message: Callable[[str], None],
    *,
    seconds: int = 10,
    wait: Callable[[float], None] = time.sleep,
) -> Path:
    """Write the report, and again when files of the runs have changed, until all runs are finished.

    Args:
        run_paths, output: as `write_report`.
        message: called with a sentence about what goes on: where the page is, that a run has stopped.
        seconds: at least as long between two pages; a browser that shows the page loads it that often.
        wait: sleeps.

    Returns:
        The path of the page, which does not refresh itself any more.

    Raises:
        UserError: as `write_report`; or a run's folder is gone.
    """
    folders = [RunFolder(Path(path)) for path in run_paths]
    target = write_report(run_paths, output, refresh_seconds=seconds)
    written, shown = time.monotonic(), _state(folders)
    if not _finished(folders):
        message(f"{target} is kept up to date every {seconds} s: open it in a browser; Ctrl-C ends this")
    quiet: set[Path] = set()
    while not _finished(folders):
        for folder in folders:
            if folder.path not in quiet and folder.summary() is None and holder(folder.path) is None:
                quiet.add(folder.path)
                message(
                    f"nothing trains in {folder.path} now: 'clicktrain resume {folder.path}' continues it"
                )
        wait(LOOK_SECONDS)
        now = _state(folders)
        if now != shown and (time.monotonic() - written >= seconds or _finished(folders)):
            target = write_report(run_paths, output, refresh_seconds=seconds)
            written, shown = time.monotonic(), now
    return write_report(run_paths, output)  # for good, as after the run itself


def _finished(folders: Sequence[RunFolder]) -> bool:
    return all(folder.summary() is not None for folder in folders)


def _state(folders: Sequence[RunFolder]) -> list[tuple[int, int]]:
    """Size and time of change of what a page is made of."""
    found = []
    for folder in folders:
        if not folder.path.is_dir():
            raise UserError(f"the folder of the run, {folder.path}, is gone")
        for path in (folder.summary_path, *folder.logs):
            try:
                facts = path.stat()
                found.append((facts.st_size, facts.st_mtime_ns))
            except FileNotFoundError:
                found.append((-1, 0))
    return found
