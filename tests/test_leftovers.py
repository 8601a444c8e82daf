"""Temporary files of processes that are gone, in folders that others may be writing to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clicktrain.data.cache import atomic_path
from clicktrain.leftovers import ABANDONED_SECONDS, process_runs, remove_abandoned

GONE = 2**22 + 7
"""Above the largest process number of Linux."""


def old(path: Path) -> Path:
    """As if nobody had written to it for long."""
    status = path.stat()
    os.utime(path, (status.st_atime, status.st_mtime - 2 * ABANDONED_SECONDS))
    return path


def test_which_processes_run() -> None:
    assert process_runs(os.getppid())
    assert not process_runs(os.getpid())  # what has our number is of one before us
    assert not process_runs(GONE)
    assert not process_runs(10**30)


def test_only_what_is_old_and_whose_process_is_gone(tmp_path: Path) -> None:
    for name in (f"a.{GONE}", f"b.{os.getppid()}", "mine.txt"):
        (tmp_path / name).write_text("x")
        old(tmp_path / name)
    (tmp_path / f"new.{GONE}").write_text("x")
    (tmp_path / f"folder.{GONE}" / "inside").mkdir(parents=True)
    old(tmp_path / f"folder.{GONE}")
    remove_abandoned(tmp_path, r".+\.(?P<pid>\d+)")
    assert {path.name for path in tmp_path.iterdir()} == {f"b.{os.getppid()}", "mine.txt", f"new.{GONE}"}
    remove_abandoned(tmp_path / "missing", ".*")


@pytest.mark.parametrize("name", ["pixels.safetensors", "other.safetensors"])
def test_a_half_decoded_data_set_goes_when_another_is_decoded(tmp_path: Path, name: str) -> None:
    half = tmp_path / f".{name}.{GONE}.tmp"
    half.write_text("half")
    old(half)
    with atomic_path(tmp_path / "pixels.safetensors") as temporary:
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["pixels.safetensors"]
