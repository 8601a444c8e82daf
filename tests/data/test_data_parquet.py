from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from image_files import encode, pixels, write_parquet

from clicktrain.data import Augment, EncodedSource, ImageData, PixelSource, make_loader, open_data
from clicktrain.errors import UserError


def opened(folder: Path, cache_dir: Path, **settings: int) -> ImageData:
    return open_data(f"parquet:{folder}", cache_dir=cache_dir, **settings)  # type: ignore[arg-type]


def assert_pixels(images: torch.Tensor, first_seed: int) -> None:
    for index, image in enumerate(images):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels(first_seed + index))


def test_train_and_test_with_class_names(tmp_path: Path, cache_dir: Path) -> None:
    labels = [0, 1, 2, 1]
    write_parquet(tmp_path / "train.parquet", labels, names=["x", "y", "z"], image_column="img")
    write_parquet(tmp_path / "test.parquet", [2, 0], names=["x", "y", "z"], image_column="img", seed=50)
    data = opened(tmp_path, cache_dir)
    assert data.classes == ("x", "y", "z")
    assert isinstance(data.train, PixelSource)
    assert isinstance(data.val, PixelSource)
    assert data.train.labels.tolist() == labels
    assert_pixels(data.train.images, 0)
    assert_pixels(data.val.images, 50)


def test_shards_are_joined_in_order_and_validation_comes_before_test(tmp_path: Path, cache_dir: Path) -> None:
    for shard in range(3):
        path = tmp_path / "data" / f"train-{shard:05}-of-00003.parquet"
        write_parquet(path, [shard % 2, 1], seed=2 * shard, plain_bytes=True)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [-1], plain_bytes=True)
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [1], seed=9, plain_bytes=True)
    data = opened(tmp_path, cache_dir)
    assert isinstance(data.train, PixelSource)
    assert data.train.labels.tolist() == [0, 1, 1, 1, 0, 1]
    assert_pixels(data.train.images, 0)
    assert isinstance(data.val, PixelSource)
    assert_pixels(data.val.images, 9)


def test_without_other_files_validation_is_split_off(tmp_path: Path, cache_dir: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1] * 10)
    data = opened(tmp_path, cache_dir)
    assert (len(data.train), len(data.val)) == (16, 4)


def test_a_set_beyond_the_memory_is_copied_once_and_read_row_by_row(tmp_path: Path, cache_dir: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1, 0])
    write_parquet(tmp_path / "train-1.parquet", [1, 1], seed=3)
    write_parquet(tmp_path / "test.parquet", [1], seed=70)
    data = opened(tmp_path, cache_dir, memory_limit=0)
    assert isinstance(data.train, EncodedSource)
    images = data.train.images
    for copy in (images, pickle.loads(pickle.dumps(images))):  # as a worker process gets it
        assert [copy.read(index) for index in range(5)] == [encode(pixels(index)) for index in range(5)]
    assert images.name(4) == f"{tmp_path / 'train-1.parquet'} row 1"
    copies = sorted(cache_dir.glob("*.arrow"))
    times = [path.stat().st_mtime_ns for path in copies]
    assert len(copies) == 2
    opened(tmp_path, cache_dir, memory_limit=0)
    assert [path.stat().st_mtime_ns for path in copies] == times
    copies[0].write_bytes(copies[0].read_bytes()[:-20])  # a damaged copy is made again
    again = opened(tmp_path, cache_dir, memory_limit=0)
    assert isinstance(again.train, EncodedSource)
    assert again.train.images.read(4) == encode(pixels(4))


def test_streaming_gives_the_batches_of_memory(tmp_path: Path, cache_dir: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1] * 8)
    write_parquet(tmp_path / "test.parquet", [1, 0, 1], seed=70)
    in_memory = opened(tmp_path, cache_dir)
    streamed = opened(tmp_path, cache_dir, memory_limit=0, workers=2)
    assert (streamed.mean, streamed.std) == (in_memory.mean, in_memory.std)
    for split, augment in (("train", Augment(crop_padding=2, flip=True, cutout=3)), ("val", Augment())):
        both = [
            make_loader(
                data,
                split,  # type: ignore[arg-type]
                batch_size=5,
                device=torch.device("cpu"),
                seed=3,
                augment=augment,
                drop_last=False,
            )
            for data in (in_memory, streamed)
        ]
        for one, other in zip(both[0].epoch(4), both[1].epoch(4), strict=True):
            assert torch.equal(one.x, other.x)
            assert torch.equal(one.y, other.y)


def test_the_copy_needs_room_and_a_folder(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "train.parquet", [0, 1, 0])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file cannot be written .* set cache_dir"):
        opened(tmp_path, tmp_path / "file", memory_limit=0)
    full = shutil._ntuple_diskusage(10**9, 10**9 - 2**20, 2**20)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match=r"row-by-row copy of .* needs 64 MiB in .* but 1 MiB are free"):
        opened(tmp_path, cache_dir, memory_limit=0)


def test_missing_files_are_named(tmp_path: Path, cache_dir: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a folder"):
        opened(tmp_path / "nowhere", cache_dir)
    with pytest.raises(UserError, match=r"has no train\.parquet .* it holds nothing"):
        opened(tmp_path, cache_dir)
    write_parquet(tmp_path / "test.parquet", [0, 1])
    with pytest.raises(UserError, match=r"has no train\.parquet .* it holds test\.parquet"):
        opened(tmp_path, cache_dir)


@pytest.mark.parametrize("damage", ["text", "tail", "middle"])
def test_a_damaged_file_is_named(tmp_path: Path, cache_dir: Path, damage: str) -> None:
    path = tmp_path / "train.parquet"
    write_parquet(path, [0, 1] * 50)
    data = bytearray(path.read_bytes())
    if damage == "middle":
        data[4 : len(data) // 2] = bytes(255 - byte for byte in data[4 : len(data) // 2])
    path.write_bytes({"text": b"hello", "tail": bytes(data[:-9]), "middle": bytes(data)}[damage])
    with pytest.raises(UserError) as caught:
        opened(tmp_path, cache_dir)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_an_empty_data_set(tmp_path: Path, cache_dir: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [])
    with pytest.raises(UserError, match="is empty: it holds no training images"):
        opened(tmp_path, cache_dir)


@pytest.mark.parametrize(
    ("columns", "fragment"),
    [
        (
            {"picture": ["a"], "label": [0]},
            r"no single image column .* its columns are picture: string, label: int64",
        ),
        ({"image": [b"a"], "kind": ["cat"]}, r"no single label column"),
        ({"a": [b"a"], "b": [b"a"], "label": [0]}, r"no single image column .*'image' is the usual name"),
        ({"image": [b"a"], "label": ["cat"]}, r"no single label column .*label: string"),
    ],
)
def test_a_missing_column_is_named(
    tmp_path: Path, cache_dir: Path, columns: dict[str, list[object]], fragment: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=fragment):
        opened(tmp_path, cache_dir)


def test_of_several_columns_the_usual_name_is_taken(tmp_path: Path, cache_dir: Path) -> None:
    image = encode(pixels(0))
    table = pa.table(
        {
            "thumbnail": [b"x"] * 4,
            "image": [image] * 4,
            "id": [7, 8, 9, 10],
            "coarse": [5] * 4,
            "label": [0, 1] * 2,
        }
    )
    pq.write_table(table, tmp_path / "train.parquet")
    data = opened(tmp_path, cache_dir)
    assert data.classes == ("0", "1")


@pytest.mark.parametrize(
    ("labels", "fragment"),
    [
        ([0, 1, None], r"train\.parquet row 2 has no label \(null\)"),
        ([0, -1, 1], r"train\.parquet row 1 has label -1 \(-1 stands for an image without a label\)"),
        ([0, 1, 5], r"train\.parquet row 2 has label 5; with 3 classes labels are 0 to 2"),
    ],
)
def test_wrong_labels_are_named(
    tmp_path: Path, cache_dir: Path, labels: list[int | None], fragment: str
) -> None:
    write_parquet(tmp_path / "train.parquet", labels, names=["a", "b", "c"])
    with pytest.raises(UserError, match=fragment):
        opened(tmp_path, cache_dir)


@pytest.mark.parametrize(
    ("image", "fragment"),
    [
        (None, r"row 1 has no image \(null\)"),
        (b"", r"row 1 is not a whole image"),
        (encode(pixels(0, (32, 32)), "JPEG")[:-300], r"row 1 is not a whole image"),
    ],
)
def test_wrong_images_are_named(tmp_path: Path, cache_dir: Path, image: bytes | None, fragment: str) -> None:
    files = [encode(pixels(0, (32, 32))), image, encode(pixels(1, (32, 32)))]
    write_parquet(tmp_path / "train.parquet", [0, 1, 1], images=files)
    with pytest.raises(UserError, match=fragment):
        opened(tmp_path, cache_dir)
    assert not cache_dir.exists()


def test_rows_that_hold_only_a_path_are_read_from_there(tmp_path: Path, cache_dir: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encode(pixels(4)))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.array([{"bytes": None, "path": str(path)}] * 4, kind)
    pq.write_table(pa.table({"image": rows, "label": [0, 1, 0, 1]}), tmp_path / "train.parquet")
    data = opened(tmp_path, cache_dir)
    assert isinstance(data.train, PixelSource)
    assert np.array_equal(data.train.images[0].permute(1, 2, 0).numpy(), pixels(4))
    os.utime(tmp_path / "train.parquet", ns=(0, 0))
    path.unlink()
    with pytest.raises(UserError, match=r"row 0 holds only the path .*picture\.png, which cannot be read"):
        opened(tmp_path, cache_dir)
