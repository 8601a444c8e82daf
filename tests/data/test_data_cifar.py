from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clicktrain.data import ImageData, PixelSource, open_data
from clicktrain.data.sources.safe_pickle import load_plain_pickle
from clicktrain.errors import UserError

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def batch(seed: int, count: int = 20) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 3072), dtype=np.uint8), np.arange(count, dtype=np.uint8) % 10


def write_binary10(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]):
        images, labels = batch(number)
        (folder / name).write_bytes(np.concatenate([labels[:, None], images], axis=1).tobytes())
    (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")


def write_python10(folder: Path, protocol: int = 2) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        images, labels = batch(number)
        content = {
            b"data": images,
            b"labels": labels.tolist(),
            b"filenames": [b"a.png"] * 20,
            b"batch_label": b"1",
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    meta = {b"label_names": [name.encode() for name in NAMES], b"num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol))


def pack(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, folder.name)


def assert_is_cifar10(data: ImageData) -> None:
    assert data.classes == tuple(NAMES)
    assert data.image_shape == (3, 32, 32)
    assert isinstance(data.train, PixelSource)
    assert isinstance(data.val, PixelSource)
    assert data.train.labels.tolist() == [n % 10 for n in range(20)] * 5
    expected = np.concatenate([batch(number)[0] for number in range(5)]).reshape(-1, 3, 32, 32)
    assert np.array_equal(data.train.images.numpy(), expected)
    assert np.array_equal(data.val.images.numpy(), batch(5)[0].reshape(-1, 3, 32, 32))


@pytest.mark.parametrize("form", ["folder", "parent", "archive in folder", "archive"])
@pytest.mark.parametrize("version", ["binary", "python"])
def test_cifar10_in_all_its_forms(tmp_path: Path, version: str, form: str) -> None:
    name = {"binary": "cifar-10-batches-bin", "python": "cifar-10-batches-py"}[version]
    folder = tmp_path / ("elsewhere" if "archive" in form else "set") / name
    {"binary": write_binary10, "python": write_python10}[version](folder)
    archive = tmp_path / "set" / f"cifar-10-{version}.tar.gz"
    if "archive" in form:
        archive.parent.mkdir()
        pack(folder, archive)
    path = {
        "folder": folder,
        "parent": tmp_path / "set",
        "archive in folder": tmp_path / "set",
        "archive": archive,
    }
    assert_is_cifar10(open_data(f"cifar10:{path[form]}"))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_pickles_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    write_python10(tmp_path / "cifar-10-batches-py", protocol)
    assert_is_cifar10(open_data(f"cifar10:{tmp_path}"))


# What Python 2 wrote, as in the official files: 8-bit strings, and NumPy's module under its old name.
PYTHON_2 = (
    b"\x80\x02}q\x01(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    b"\x89U\x06\x00\x01\x02\x03\x04\x05tbU\x06labels]q\x02(K\x01K\x00eu."
)


def test_a_pickle_of_python_2_is_read() -> None:
    loaded = load_plain_pickle(PYTHON_2, "batch")
    assert loaded["data"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert loaded["data"].dtype == np.uint8
    assert loaded["labels"] == [1, 0]


def test_an_array_that_lies_about_its_size_is_refused() -> None:
    with pytest.raises(UserError, match="another size"):
        load_plain_pickle(PYTHON_2.replace(b"K\x02K\x03\x86", b"K\x02K\x7f\x86"), "batch")


@pytest.mark.parametrize("version", ["binary", "python"])
def test_cifar100_has_fine_labels(tmp_path: Path, version: str) -> None:
    names = [f"fine {n}" for n in range(100)] if version == "python" else [f"fine_{n}" for n in range(100)]
    images, _ = batch(0, 200)
    fine, coarse = np.arange(200, dtype=np.uint8) % 100, np.arange(200, dtype=np.uint8) % 20
    folder = tmp_path / f"cifar-100-{version}"
    folder.mkdir()
    if version == "binary":
        records = np.concatenate([coarse[:, None], fine[:, None], images], axis=1).tobytes()
        (folder / "train.bin").write_bytes(records)
        (folder / "test.bin").write_bytes(records)
        (folder / "fine_label_names.txt").write_text("\n".join(names))
    else:
        content = {b"data": images, b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}
        (folder / "train").write_bytes(pickle.dumps(content, 2))
        (folder / "test").write_bytes(pickle.dumps(content, 2))
        (folder / "meta").write_bytes(
            pickle.dumps({b"fine_label_names": [name.encode() for name in names]}, 2)
        )
    data = open_data(f"cifar100:{tmp_path}")
    assert data.classes == tuple(names)
    assert isinstance(data.train, PixelSource)
    assert data.train.labels.tolist() == fine.tolist()
    assert np.array_equal(data.train.images.numpy(), images.reshape(-1, 3, 32, 32))


class Touch:
    """What a hostile pickle looks like."""

    def __init__(self, path: Path, how: Any) -> None:
        self.path, self.how = path, how

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return self.how, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("how", [os.system, eval, __import__, np.load, getattr])
def test_a_pickle_that_asks_for_code_is_refused_unexecuted(tmp_path: Path, protocol: int, how: Any) -> None:
    marker = tmp_path / "executed"
    write_python10(tmp_path / "set")
    raw = pickle.dumps({b"data": Touch(marker, how), b"labels": [0]}, protocol)
    (tmp_path / "set" / "data_batch_3").write_bytes(raw)
    with pytest.raises(UserError, match=r"data_batch_3 is not a CIFAR batch of plain data \(it asks for"):
        open_data(f"cifar10:{tmp_path / 'set'}")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        {b"data": np.array([object()])},
        {b"data": np.zeros(3, dtype=">i4")},
        {b"data": np.zeros(3, dtype="f8")},
        {b"data": np.zeros(3, dtype="O")},
        {b"data": {1, 2}},
        [1, 2],
    ],
)
def test_anything_but_plain_data_is_refused(content: object) -> None:
    with pytest.raises(UserError, match="batch is not a CIFAR batch of plain data"):
        load_plain_pickle(pickle.dumps(content, 2), "batch")


def test_room_for_objects_that_are_not_there_is_not_made() -> None:
    raw = pickle.dumps({b"x": b"y"}, 2)
    gigantic = raw.replace(pickle.BINPUT + b"\x00", pickle.LONG_BINPUT + b"\xff\xff\xff\x7f", 1)
    assert gigantic != raw
    with pytest.raises(UserError, match="its memo has an entry numbered 2147483647"):
        load_plain_pickle(gigantic, "batch")


@given(cut=st.integers(0, 400), flip=st.integers(0, 399), bits=st.integers(0, 255))
def test_a_damaged_pickle_is_a_user_error_or_plain_data(cut: int, flip: int, bits: int) -> None:
    raw = bytearray(
        pickle.dumps({b"data": np.zeros((2, 3), np.uint8), b"labels": [0, 1], b"x": b"y" * 100}, 2)
    )
    if flip < len(raw):
        raw[flip] ^= bits
    try:
        loaded = load_plain_pickle(bytes(raw[: len(raw) - cut]), "batch")
    except (UserError, MemoryError):  # a length may have become gigantic
        return
    assert all(isinstance(key, str) for key in loaded)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        open_data(f"cifar10:{tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match=r"holds no cifar10 data; put cifar-10-binary\.tar\.gz or"):
        open_data(f"cifar10:{tmp_path}")
    write_binary10(tmp_path / "cifar-10-batches-bin")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()
    with pytest.raises(UserError, match=r"has no data_batch_4\.bin"):
        open_data(f"cifar10:{tmp_path}")
    with pytest.raises(UserError, match=r"holds no cifar100 data"):
        open_data(f"cifar100:{tmp_path}")


def test_a_damaged_binary_batch_is_named(tmp_path: Path) -> None:
    write_binary10(tmp_path / "set")
    path = tmp_path / "set" / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"data_batch_2\.bin has 61459 bytes, which is no whole number of 3073"
    ):
        open_data(f"cifar10:{tmp_path / 'set'}")
    path.write_bytes(b"\x0b" + bytes(3072))
    with pytest.raises(UserError, match=r"image 20 has label 11; with 10 classes"):
        open_data(f"cifar10:{tmp_path / 'set'}")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "other"])
def test_a_damaged_archive_is_named(tmp_path: Path, damage: str) -> None:
    archive = tmp_path / "cifar-10-binary.tar.gz"
    write_binary10(tmp_path / "elsewhere" / "cifar-10-batches-bin")
    pack(tmp_path / "elsewhere" / "cifar-10-batches-bin", archive)
    data = archive.read_bytes()
    archive.write_bytes(
        {"truncated": data[: len(data) // 2], "text": b"not found", "empty": b"", "other": data}[damage]
    )
    if damage == "other":
        with tarfile.open(archive, "w:gz") as file:
            file.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    with pytest.raises(UserError, match=r"cifar-10-binary\.tar\.gz (is not a whole|has no|holds no)"):
        open_data(f"cifar10:{archive}")


def test_the_binary_version_is_preferred(tmp_path: Path) -> None:
    write_binary10(tmp_path / "cifar-10-batches-bin")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"never looked at")
    data = open_data(f"cifar10:{tmp_path}")
    assert isinstance(data.train, PixelSource)
    assert torch.equal(data.train.labels.bincount(), torch.full((10,), 10))
