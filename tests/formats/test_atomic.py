"""Files that are whole or not there, on a disk that fills up."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from clicktrain.errors import UserError
from clicktrain.formats.tree import (
    append_jsonl,
    load_tree,
    remove_leftovers,
    replace_file,
    save_tree,
    write_text_atomic,
)


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow over 1000 bytes: the operating system itself refuses the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, small_disk: None) -> None:
    path = tmp_path / "state.safetensors"
    save_tree(path, {"a": torch.ones(3)})
    with pytest.raises(UserError, match=r"no space left .*state\.safetensors"):
        save_tree(path, {"a": torch.zeros(1000)})
    with pytest.raises(UserError, match="no space left"):
        write_text_atomic(path, "x" * 2000)
    assert list(tmp_path.iterdir()) == [path]
    assert torch.equal(load_tree(path)["a"], torch.ones(3))


def test_a_full_disk_leaves_a_log_as_it_was(tmp_path: Path, small_disk: None) -> None:
    path = tmp_path / "log"
    append_jsonl(path, {"epoch": 1})
    with pytest.raises(UserError, match="no space left"):
        append_jsonl(path, {"epoch": 2, "long": "x" * 2000})
    append_jsonl(path, {"epoch": 3})
    assert path.read_text() == '{"epoch": 1}\n{"epoch": 3}\n'


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "missing" / "it.json", tmp_path / "file" / "it.json"):
        with pytest.raises(OSError) as error:
            write_text_atomic(path, "{}")
        assert error.value.filename == str(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_is_told() -> None:
    with pytest.raises(UserError, match="no space left"):
        append_jsonl("/dev/full", {"epoch": 1})


def test_an_error_inside_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")

    def fail() -> None:
        with replace_file(tmp_path / "old") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text_atomic(tmp_path / "missing" / "file", "x")


def test_readable_by_others_as_any_new_file(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text_atomic(tmp_path / "a", "grün")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640
    assert (tmp_path / "a").read_bytes() == "grün".encode()


def test_what_a_killed_writer_left_can_be_removed(tmp_path: Path, repository: Path) -> None:
    code = """
import os, signal, sys
from clicktrain.formats.atomic import replace_file
with replace_file(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "state")], cwd=repository, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"half"]
    assert not (tmp_path / "state").exists()
    write_text_atomic(tmp_path / "state", "whole")
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_lines_of_json(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append_jsonl(path, {"loss": float("nan"), "deep": [1.5, {"x": float("-inf")}], "who": "Ä\n"})
    append_jsonl(path, {"epoch": 2})
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"loss": None, "deep": [1.5, {"x": None}], "who": "Ä\n"},
        {"epoch": 2},
    ]
    with pytest.raises(TypeError):
        append_jsonl(path, {"tensor": torch.ones(1)})
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize("rest", ["", '{"epo', "x" * 10_000])
@pytest.mark.parametrize("before", ["", '{"epoch": 1}\n'])
def test_an_unfinished_line_is_cut_off(before: str, rest: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(before + rest)
    append_jsonl(path, {"epoch": 2})
    assert path.read_text() == before + '{"epoch": 2}\n'
