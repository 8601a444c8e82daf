from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from clicktrain.data.cache import PixelCache, atomic_path, default_cache_dir, files_fingerprint, require_space
from clicktrain.errors import UserError

TENSORS = {"train": torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2), "sums": torch.tensor([[1, 2**40]])}


def test_what_is_stored_is_loaded(cache_dir: Path) -> None:
    cache = PixelCache(cache_dir)
    assert cache.load("key") is None
    cache.store("key", TENSORS)
    loaded = cache.load("key")
    assert loaded is not None
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    assert os.listdir(cache_dir) == ["key.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "empty", "bit", "text"])
def test_a_damaged_file_is_worth_nothing_and_is_replaced(
    cache_dir: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    cache = PixelCache(cache_dir)
    cache.store("key", TENSORS)
    data = bytearray(cache.path("key").read_bytes())
    data[-1] ^= 1
    cache.path("key").write_bytes(
        {"truncated": bytes(data[:-5]), "empty": b"", "bit": bytes(data), "text": b"hello world, no tensors"}[
            damage
        ]
    )
    assert cache.load("key") is None
    assert "is damaged" in caplog.text
    cache.store("key", TENSORS)
    assert cache.load("key") is not None


def test_a_folder_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        PixelCache(tmp_path / "file" / "cache").store("key", TENSORS)
    assert len(caplog.records) == 1
    assert "cannot be written" in caplog.text


def test_too_little_disk_is_said_before_anything_is_written(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil._ntuple_diskusage(10**9, 10**9 - 3 * 2**20, 3 * 2**20)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match=r"needs 64 MiB in .*cache but 3 MiB are free.*set cache_dir"):
        PixelCache(cache_dir).store("key", TENSORS)
    assert not cache_dir.exists()


def test_space_is_looked_up_in_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1, "a test")
    with pytest.raises(UserError, match=r"a test needs .* GiB"):
        require_space(tmp_path / "not" / "yet", 2**60, "a test")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_the_fingerprint_follows_name_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("x")
    os.utime(path, ns=(0, 0))
    first = files_fingerprint([path])
    assert files_fingerprint([path]) == first
    os.utime(path, ns=(0, 1))
    touched = files_fingerprint([path])
    path.write_text("xy")
    os.utime(path, ns=(0, 0))
    longer = files_fingerprint([path])
    os.utime(path.rename(tmp_path / "b"), ns=(0, 0))
    assert len({first, touched, longer, files_fingerprint([tmp_path / "b"])}) == 4


def test_the_default_folder_follows_the_environment(tmp_path: Path) -> None:
    assert default_cache_dir() == tmp_path / "xdg" / "clicktrain"
