"""What is wrong with shards is one sentence, which names the shard and the sample."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from image_files import encode, pixels
from shard_files import add, opened, write_groups, write_shards, write_tar

from clicktrain.data import Augment, ImageData, make_loader, open_data
from clicktrain.errors import UserError

GOOD = [encode(pixels(seed, channels=1)) for seed in range(8)]
LABELS = [0, 1] * 4


def train(data: ImageData) -> None:
    loader = make_loader(
        data, "train", batch_size=2, device=torch.device("cpu"), seed=1, augment=Augment(), drop_last=True
    )
    for _ in loader.epoch(0):
        pass


def tar(folder: Path, **settings: object) -> Path:
    """Two shards, of which the second has what is wrong."""
    write_tar(folder / "train-0.tar", LABELS)
    settings = {"labels": LABELS, "images": GOOD, **settings}
    write_tar(folder / "train-1.tar", **settings)  # type: ignore[arg-type]
    return folder / "train-1.tar"


def refused(kind: str, folder: Path, cache_dir: Path, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        train(opened(kind, folder, cache_dir, workers=0, val_fraction=0.2))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([0, 1, None, 1], "/train-1.tar sample a/000002 has no label: a member .cls with its class number"),
        ([0, 1, "cat", 1], "/train-1.tar sample a/000002 has label 'cat'; class numbers that count from 0"),
        ([0, 1, -1, 1], "/train-1.tar sample a/000002 has label -1 (-1 stands for an image without a label)"),
        (
            [0, 1, 3, 10**9],
            "/train-1.tar sample a/000003 has label 1000000000; with up to 10,000,000 classes",
        ),
        ([0, 1, 3, 99], "/train-1.tar sample a/000003 has label 99, more than there are training images"),
    ],
)
def test_a_wrong_label_in_a_tar(labels: list[object], sentence: str, tmp_path: Path, cache_dir: Path) -> None:
    tar(tmp_path, labels=labels, images=GOOD[: len(labels)])
    refused("webdataset", tmp_path, cache_dir, sentence)


def test_a_wrong_label_in_json(tmp_path: Path, cache_dir: Path) -> None:
    tar(tmp_path, labels=[0, 1, True, 1], images=GOOD[:4], label_kind="json")
    refused("webdataset", tmp_path, cache_dir, "/train-1.tar sample a/000002 has label True")


@pytest.mark.parametrize(
    ("kind", "data"), [("json", b"{"), ("json", b"[1]"), ("json", b'{"text": 1}'), ("txt", b"1")]
)
def test_nothing_that_says_the_class(kind: str, data: bytes, tmp_path: Path, cache_dir: Path) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as out:
        add(out, "b/dog.1.png", GOOD[0])
        add(out, f"b/dog.{kind}", data)
    refused("webdataset", tmp_path, cache_dir, "/train.tar sample b/dog has no ")


@pytest.mark.parametrize(
    ("members", "sentence"),
    [
        (["x.png", "x.jpg", "x.cls"], "sample x has several images (.png, .jpg); one is needed"),
        (["x.cls", "x.txt"], "sample x has no image (.jpg, .jpeg, .png"),
        (["x.png", "x.cls", "x.cls"], "sample x has two members .cls: names of samples must differ"),
    ],
)
def test_members_that_make_no_sample(
    members: list[str], sentence: str, tmp_path: Path, cache_dir: Path
) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as out:
        for name in members:
            add(out, name, b"1" if name.endswith("cls") else GOOD[0])
    refused("webdataset", tmp_path, cache_dir, sentence)


def test_links_in_a_tar_are_refused_and_folders_and_hidden_files_passed_over(
    tmp_path: Path, cache_dir: Path
) -> None:
    for with_link in (False, True):
        with tarfile.open(tmp_path / "train.tar", "w") as out:
            folder = tarfile.TarInfo("d")
            folder.type = tarfile.DIRTYPE
            out.addfile(folder)
            add(out, "d/.DS_Store", b"x")
            for index, data in enumerate(GOOD):
                add(out, f"d/{index}.png", data)
                add(out, f"d/{index}.cls", str(index % 2).encode())
            if with_link:
                link = tarfile.TarInfo("d/9.png")
                link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
                out.addfile(link)
        if not with_link:
            assert len(opened("webdataset", tmp_path, cache_dir, workers=0, holdout=2).train) == 6
    refused("webdataset", tmp_path, cache_dir, "member 'd/9.png' is no regular file: remove it")


@pytest.mark.parametrize("cut", [100, 512, 1024, 2000, 4000])
def test_a_tar_that_is_cut_short(cut: int, tmp_path: Path, cache_dir: Path) -> None:
    path = tar(tmp_path)
    end = 8 * 2048  # the last sample's
    path.write_bytes(path.read_bytes()[: end + 100 - cut])
    refused("webdataset", tmp_path, cache_dir, f"{path} is not a whole tar file (")


def test_a_tar_with_a_damaged_header(tmp_path: Path, cache_dir: Path) -> None:
    path = tar(tmp_path)
    data = bytearray(path.read_bytes())
    data[3 * 2048 + 10] ^= 0xFF
    path.write_bytes(data)
    refused(
        "webdataset", tmp_path, cache_dir,
        f"{path} is not a whole tar file (byte 6,144: a damaged header after sample a/000002); get it again",
    )  # fmt: skip


def test_a_file_that_is_no_tar_or_compressed(tmp_path: Path, cache_dir: Path) -> None:
    path = tar(tmp_path)
    (tmp_path / "train-2.tar").write_bytes(gzip.compress(path.read_bytes()))
    refused("webdataset", tmp_path, cache_dir, "/train-2.tar is not a whole tar file (")
    (tmp_path / "train-2.tar").rename(tmp_path / "train-2.tar.gz")
    refused("webdataset", tmp_path, cache_dir, "/train-2.tar.gz is compressed as a whole")


@pytest.mark.parametrize("kind", ["webdataset", "parquet-shards"])
def test_a_broken_image_stops_the_epoch(kind: str, tmp_path: Path, cache_dir: Path) -> None:
    images = [*GOOD[:5], GOOD[5][:40], *GOOD[6:]]
    if kind == "webdataset":
        name = f"{tar(tmp_path, images=images)} sample a/000005"
    else:
        write_groups(tmp_path / "train-0.parquet", LABELS)
        write_groups(tmp_path / "train-1.parquet", LABELS, images=images, rows=4)
        name = f"{tmp_path}/train-1.parquet row 5"
    refused(kind, tmp_path, cache_dir, f"{name} is not a whole image")


@pytest.mark.parametrize("kind", ["webdataset", "parquet-shards"])
def test_a_broken_image_that_no_look_at_a_sample_finds(kind: str, tmp_path: Path, cache_dir: Path) -> None:
    """Only the epoch reads it: a worker, in another process."""
    write_shards(kind, tmp_path, (40,), classes=2)
    data = opened(kind, tmp_path, cache_dir, workers=1, holdout=8)
    path = next(tmp_path.glob("train*"))
    broken = path.read_bytes().replace(b"IDAT", b"IDAx")
    path.write_bytes(broken)  # of the same length
    with pytest.raises(
        UserError, match=r"train-0+(\.tar sample a/0000\d\d|-of-00001\.parquet row \d+) is not a whole"
    ):
        train(data)


@pytest.mark.parametrize("kind", ["webdataset", "parquet-shards"])
def test_images_of_different_sizes(kind: str, tmp_path: Path, cache_dir: Path) -> None:
    images = [*GOOD[:6], encode(pixels(0, (9, 12), channels=1)), GOOD[7]]
    if kind == "webdataset":
        name = f"{tar(tmp_path, images=images)} sample a/000006"
    else:
        write_groups(tmp_path / "train-0.parquet", LABELS)
        write_groups(tmp_path / "train-1.parquet", LABELS, images=images)
        name = f"{tmp_path}/train-1.parquet row 6"
    refused(kind, tmp_path, cache_dir, f"images are of mixed sizes ({name} is 12x9")
    assert open_data(f"{kind}:{tmp_path}", image_size=8, cache_dir=cache_dir, holdout=3).image_shape == (
        1,
        8,
        8,
    )


def test_a_parquet_row_without_a_label_or_an_image(tmp_path: Path, cache_dir: Path) -> None:
    write_groups(tmp_path / "train-0.parquet", LABELS)
    path = tmp_path / "train-1.parquet"
    write_groups(path, [0, 1, 0, 1, 0, None, 0, 1], rows=4)
    refused("parquet-shards", tmp_path, cache_dir, f"{path} row 5 has no label (null)")
    write_groups(path, [0, 1, 0, 1, 0, -1, 0, 1], rows=4)
    refused("parquet-shards", tmp_path, cache_dir, f"{path} row 5 has label -1 (-1 stands for")
    write_groups(path, LABELS, images=[*GOOD[:5], None, *GOOD[6:]], rows=4)  # type: ignore[list-item]
    refused("parquet-shards", tmp_path, cache_dir, f"{path} row 5 has no image")


def test_a_parquet_shard_that_is_damaged_missing_or_other_than_the_rest(
    tmp_path: Path, cache_dir: Path
) -> None:
    write_shards("parquet-shards", tmp_path, (20, 20, 20), classes=2)
    path = tmp_path / "train-00001-of-00003.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    refused("parquet-shards", tmp_path, cache_dir, f"{path} is not a whole parquet file")
    damaged = bytearray(whole)
    damaged[4:200] = np.random.default_rng(0).bytes(196)
    path.write_bytes(damaged)
    refused("parquet-shards", tmp_path, cache_dir, str(path))
    path.unlink()
    refused("parquet-shards", tmp_path, cache_dir, f"{path.parent}/train-00001-of-00003 is missing")
    pq.write_table(
        pq.read_table(tmp_path / "train-00000-of-00003.parquet").rename_columns(["image", "y"]), path
    )
    refused("parquet-shards", tmp_path, cache_dir, f"{path} has columns image, y but ")


def test_a_row_group_that_would_fill_the_memory(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clicktrain.data.shards.parquet.LARGEST_GROUP", 2000)
    write_groups(tmp_path / "train.parquet", LABELS * 10, rows=100)
    refused("parquet-shards", tmp_path, cache_dir, "train.parquet has a row group of 80 rows and 0 MiB")


@pytest.mark.parametrize("kind", ["webdataset", "parquet-shards"])
def test_folders_without_shards_or_with_one_class(kind: str, tmp_path: Path, cache_dir: Path) -> None:
    refused(
        kind, tmp_path / "none", cache_dir, f"data {kind}:{tmp_path}/none: {tmp_path}/none is not a folder"
    )
    refused(kind, tmp_path, cache_dir, "has no training shards (train-*")
    write_shards(kind, tmp_path, (20,), classes=1)
    refused(kind, tmp_path, cache_dir, "has training images of one class only ('0')")
    write_shards(kind, tmp_path, (20,), classes=2)
    write_shards(kind, tmp_path, (20,), split="val", classes=3)
    refused(kind, tmp_path, cache_dir, "class '2' has validation images but no training images")
    write_shards(kind, tmp_path, (0,), split="val")
    refused(kind, tmp_path, cache_dir, "is empty: it holds no validation images")


def test_a_buffer_that_is_larger_than_the_memory(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards("webdataset", tmp_path, (40,), classes=2)
    monkeypatch.setattr("clicktrain.limits.machine_bytes", lambda: 3000)
    with pytest.raises(UserError, match=r"a buffer of 4,096 images of webdataset:.* lower shuffle_buffer"):
        opened("webdataset", tmp_path, cache_dir, workers=0)
    assert len(opened("webdataset", tmp_path, cache_dir, workers=0, shuffle_buffer=10).train) == 32


def test_a_buffer_is_for_shards_only(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"shuffle_buffer is for data in shards \(parquet-shards, webdataset\)"
    ):
        open_data("digits", shuffle_buffer=10)
