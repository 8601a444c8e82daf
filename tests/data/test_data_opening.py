from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from image_files import encode, pixels, write_class_folders

from clicktrain.data import Augment, PixelSource, make_loader, open_data
from clicktrain.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_class_folders(tmp_path / "set" / "train", per_class=5)
    write_class_folders(tmp_path / "set" / "val", per_class=2, seed=40)
    return tmp_path / "set"


def test_digits_are_the_real_ones_with_a_fixed_split() -> None:
    data, other = open_data("digits", seed=0), open_data("digits", seed=9, val_fraction=0.5)
    assert data.image_shape == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    assert isinstance(data.train, PixelSource)
    assert isinstance(data.val, PixelSource)
    assert (len(data.train), len(data.val)) == (1442, 355)
    assert isinstance(other.val, PixelSource)
    assert torch.equal(data.val.images, other.val.images)
    assert int(data.train.images.max()) == 255
    held_out, kept = data.val.labels.bincount(), data.train.labels.bincount()
    shares = held_out / (held_out + kept)
    assert torch.all((shares - 0.2).abs() < 0.01)
    pixel = data.train.images.double() / 255
    assert data.mean[0] == pytest.approx(float(pixel.mean()))
    assert data.std[0] == pytest.approx(float(pixel.std(correction=0)))


def test_digits_can_be_enlarged() -> None:
    data = open_data("digits", image_size=16)
    assert data.image_shape == (1, 16, 16)
    assert isinstance(data.train, PixelSource)
    small = open_data("digits").train
    assert isinstance(small, PixelSource)
    halved = torch.nn.functional.avg_pool2d(data.train.images.float(), 2)
    assert float((halved - small.images.float()).abs().mean()) < 20


def test_synthetic_images_can_be_learned() -> None:
    data = open_data("synthetic:classes=5,size=12,train=200,val=50")
    assert data.describe().startswith("synthetic:classes=5")
    assert "200 training and 50 validation images, 5 classes, 12x12 RGB, in memory" in data.describe()

    def everything(split: Literal["train", "val"]) -> tuple[torch.Tensor, torch.Tensor]:
        cpu = torch.device("cpu")
        loader = make_loader(
            data, split, batch_size=200, device=cpu, seed=0, augment=Augment(), drop_last=False
        )
        batch = next(loader.epoch(0))
        return batch.x.flatten(1), batch.y

    (x, y), (val_x, val_y) = everything("train"), everything("val")
    centers = torch.stack([x[y == label].mean(0) for label in range(5)])
    nearest = torch.cdist(val_x, centers).argmin(1)
    assert float((nearest == val_y).float().mean()) > 0.9


def test_synthetic_images_are_fixed_by_their_settings() -> None:
    def train(spec: str) -> torch.Tensor:
        source = open_data(spec).train
        assert isinstance(source, PixelSource)
        return source.images

    assert torch.equal(train("synthetic:size=4,train=20"), train("synthetic:train=20,size=4,seed=0"))
    assert not torch.equal(train("synthetic:size=4,train=20"), train("synthetic:size=4,train=20,seed=1"))
    assert train("synthetic:channels=1,size=4,train=20").shape == (20, 1, 4, 4)


@pytest.mark.parametrize(
    ("argument", "fragment"),
    [
        ("clases=3", "no setting 'clases'; it has classes, size"),
        ("classes=1", "classes='1' is not possible; an integer from 2"),
        ("size=big", "size='big'"),
        ("train=-4", "train='-4'"),
        ("classes=30,train=10", "fewer than its 30 classes"),
    ],
)
def test_wrong_synthetic_settings_are_named(argument: str, fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        open_data(f"synthetic:{argument}")


def test_decoded_pixels_are_those_of_the_files(folder: Path, cache_dir: Path) -> None:
    data = open_data(f"imagefolder:{folder}", cache_dir=cache_dir)
    assert data.classes == ("cat", "dog")
    assert isinstance(data.train, PixelSource)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5
    for index in range(10):
        expected = pixels(100 * (index // 5) + index % 5)
        assert np.array_equal(data.train.images[index].permute(1, 2, 0).numpy(), expected)


def test_the_second_start_reads_the_cache_and_not_the_files(folder: Path, cache_dir: Path) -> None:
    first = open_data(f"imagefolder:{folder}", cache_dir=cache_dir)
    for path in folder.rglob("*.png"):  # same name, size and time: taken for the same
        status = path.stat()
        path.write_bytes(b"x" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    second = open_data(f"imagefolder:{folder}", cache_dir=cache_dir)
    assert isinstance(first.train, PixelSource)
    assert isinstance(second.train, PixelSource)
    assert torch.equal(first.train.images, second.train.images)
    assert (first.mean, first.std) == (second.mean, second.std)


def test_a_changed_file_or_size_is_decoded_anew(folder: Path, cache_dir: Path) -> None:
    open_data(f"imagefolder:{folder}", cache_dir=cache_dir)
    path = folder / "train" / "cat" / "0.png"
    path.write_bytes(encode(pixels(999)))
    os.utime(path, ns=(0, 0))
    data = open_data(f"imagefolder:{folder}", cache_dir=cache_dir)
    assert isinstance(data.train, PixelSource)
    assert np.array_equal(data.train.images[0].permute(1, 2, 0).numpy(), pixels(999))
    assert open_data(f"imagefolder:{folder}", cache_dir=cache_dir, image_size=4).image_shape == (3, 4, 4)
    assert len(list(cache_dir.iterdir())) == 3


def test_a_damaged_cache_is_made_again(
    folder: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_data(f"imagefolder:{folder}", cache_dir=cache_dir)
    (path,) = cache_dir.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    second = open_data(f"imagefolder:{folder}", cache_dir=cache_dir)
    assert "is damaged" in caplog.text
    caplog.clear()
    third = open_data(f"imagefolder:{folder}", cache_dir=cache_dir)
    assert "is damaged" not in caplog.text
    assert isinstance(first.val, PixelSource)
    for data in (second, third):
        assert isinstance(data.val, PixelSource)
        assert torch.equal(data.val.images, first.val.images)


def test_a_cache_that_cannot_be_written_is_one_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        data = open_data(f"imagefolder:{folder}", cache_dir=tmp_path / "file")
    assert len(data.train) == 10
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_full_disk_is_an_error_with_the_figures(
    folder: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil._ntuple_diskusage(10**9, 10**9 - 2**20, 2**20)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match=r"needs 64 MiB in .* but 1 MiB are free"):
        open_data(f"imagefolder:{folder}", cache_dir=cache_dir)


def test_one_truncated_jpeg_is_named_and_nothing_is_cached(tmp_path: Path, cache_dir: Path) -> None:
    write_class_folders(tmp_path / "set", suffix="jpg", size=(32, 32))
    broken = tmp_path / "set" / "dog" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:-200])
    with pytest.raises(UserError) as caught:
        open_data(f"imagefolder:{tmp_path / 'set'}", cache_dir=cache_dir)
    assert str(caught.value).startswith(str(broken))
    assert "remove it, then start again" in str(caught.value)
    assert not cache_dir.exists()
    broken.unlink()
    assert len(open_data(f"imagefolder:{tmp_path / 'set'}", cache_dir=cache_dir).train) == 5


def test_mixed_sizes_need_image_size(tmp_path: Path, cache_dir: Path) -> None:
    write_class_folders(tmp_path / "set")
    (tmp_path / "set" / "dog" / "2.png").write_bytes(encode(pixels(0, (9, 13))))
    spec = f"imagefolder:{tmp_path / 'set'}"
    with pytest.raises(
        UserError, match=r"mixed sizes \(.*2\.png is 13x9, .*0\.png 8x8 pixels\); set image_size"
    ):
        open_data(spec, cache_dir=cache_dir)
    assert open_data(spec, cache_dir=cache_dir, image_size=6).image_shape == (3, 6, 6)


def test_gray_files_make_a_gray_data_set(tmp_path: Path, cache_dir: Path) -> None:
    for number, name in enumerate("ab"):
        for index in range(3):
            path = tmp_path / "set" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(pixels(10 * number + index, channels=1)))
    data = open_data(f"imagefolder:{tmp_path / 'set'}", cache_dir=cache_dir)
    assert data.image_shape == (1, 8, 8)
    assert len(data.mean) == 1


def test_a_split_by_seed_shares_one_cache_file(tmp_path: Path, cache_dir: Path) -> None:
    write_class_folders(tmp_path / "set", per_class=20)
    spec = f"imagefolder:{tmp_path / 'set'}"
    first, again, other = (open_data(spec, cache_dir=cache_dir, seed=seed) for seed in (0, 0, 1))
    assert len(list(cache_dir.iterdir())) == 1
    assert (len(first.train), len(first.val)) == (32, 8)
    for data in (first, again, other):
        assert isinstance(data.train, PixelSource)
        assert isinstance(data.val, PixelSource)
        pixel = data.train.images.double() / 255
        assert data.mean == pytest.approx(pixel.mean((0, 2, 3)).tolist())  # of the training images alone
        every = torch.cat([data.train.images, data.val.images]).flatten(1)
        assert len(every.unique(dim=0)) == 40
    assert isinstance(first.val, PixelSource)
    assert isinstance(again.val, PixelSource)
    assert isinstance(other.val, PixelSource)
    assert torch.equal(first.val.images, again.val.images)
    assert not torch.equal(first.val.images, other.val.images)


def test_real_cifar10(cifar10_dir: Path, cache_dir: Path) -> None:
    data = open_data(f"parquet:{cifar10_dir}", cache_dir=cache_dir, memory_limit=0, workers=0)
    assert (len(data.train), len(data.val)) == (50000, 10000)
    assert data.image_shape == (3, 32, 32)
    assert data.classes[0] == "airplane"
    assert data.classes[9] == "truck"
    # the figures that CIFAR recipes use, here of a sample of 4,096 images
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.01)
    assert data.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=0.01)
    loader = make_loader(
        data, "val", batch_size=64, device=torch.device("cpu"), seed=0, augment=Augment(), drop_last=False
    )
    batch = next(loader.epoch(0))
    assert batch.x.shape == (64, 3, 32, 32)
