from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Literal

import pytest
import torch
from image_files import encode, pixels, write_class_folders

from clicktrain.data import Augment, Batch, EncodedSource, ImageData, make_loader, open_data
from clicktrain.errors import UserError

FULL = Augment(resized_crop=True, flip=True, cutout=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_class_folders(tmp_path / "set" / "train", per_class=10, size=(12, 16), suffix="jpg")
    write_class_folders(tmp_path / "set" / "val", per_class=3, size=(12, 16), suffix="jpg", seed=50)
    return tmp_path / "set"


def streamed(folder: Path, cache_dir: Path, image_size: int | None = 8, workers: int = 0) -> ImageData:
    data = open_data(
        f"imagefolder:{folder}", image_size=image_size, cache_dir=cache_dir, workers=workers, memory_limit=0
    )
    assert isinstance(data.train, EncodedSource)
    return data


def batches(
    data: ImageData, split: Literal["train", "val"], augment: Augment, epoch: int, start: int = 0
) -> list[Batch]:
    loader = make_loader(
        data, split, batch_size=3, device=torch.device("cpu"), seed=1, augment=augment, drop_last=False
    )
    return list(loader.epoch(epoch, start))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.y, other.y)


def test_workers_and_a_late_start_change_nothing(folder: Path, cache_dir: Path) -> None:
    here = batches(streamed(folder, cache_dir), "train", FULL, 2)
    assert len(here) == 7
    state = torch.get_rng_state()
    elsewhere = batches(streamed(folder, cache_dir, workers=2), "train", FULL, 2, start=4)
    assert_same(elsewhere, here[4:])
    assert torch.equal(
        torch.get_rng_state(), state
    )  # a resumed run restores it, so loading must not draw from it


def test_images_that_are_passed_over_are_not_decoded(folder: Path, cache_dir: Path) -> None:
    data = streamed(folder, cache_dir)
    whole = batches(data, "train", FULL, 0)
    for path in (folder / "train").rglob("*.jpg"):
        path.write_bytes(b"gone")
    with pytest.raises(UserError):
        batches(data, "train", FULL, 0)
    assert batches(data, "train", FULL, 0, start=len(whole)) == []


def test_validation_is_resize_and_center_crop(folder: Path, cache_dir: Path) -> None:
    data = streamed(folder, cache_dir)
    first, second = batches(data, "val", FULL, 0), batches(data, "val", Augment(), 5)
    assert_same(first, second)
    assert [batch.y.tolist() for batch in first] == [[0, 0, 0], [1, 1, 1]]
    flat = encode(pixels(0, (12, 16)) * 0 + 51, "PNG")
    (folder / "val" / "cat" / "0.jpg").write_bytes(flat)
    x = batches(data, "val", Augment(), 0)[0].x[0]
    mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
    torch.testing.assert_close(x, ((0.2 - mean) / std).expand(3, 8, 8))


def test_training_crops_differ_by_epoch(folder: Path, cache_dir: Path) -> None:
    data = streamed(folder, cache_dir)
    crops = Augment(resized_crop=True)
    first, second = (
        torch.cat([batch.x for batch in batches(data, "train", crops, epoch)]) for epoch in (0, 1)
    )
    assert not torch.equal(first.sort(0).values, second.sort(0).values)
    assert first.shape == (20, 3, 8, 8)


def test_a_broken_image_stops_the_epoch_with_one_sentence(folder: Path, cache_dir: Path) -> None:
    data = streamed(folder, cache_dir, workers=1)
    path = folder / "val" / "dog" / "1.jpg"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(UserError) as caught:
        batches(data, "val", Augment(), 0)
    assert str(caught.value).startswith(f"{path} is not a whole image")
    assert "\n" not in str(caught.value)


def test_a_missing_image_stops_the_epoch_with_one_sentence(folder: Path, cache_dir: Path) -> None:
    data = streamed(folder, cache_dir)
    (folder / "val" / "dog" / "1.jpg").unlink()
    with pytest.raises(UserError, match=r"dog/1\.jpg cannot be read \(No such file"):
        batches(data, "val", Augment(), 0)


def test_without_image_size_all_must_have_one_size(folder: Path, cache_dir: Path) -> None:
    data = streamed(folder, cache_dir, image_size=None)
    assert data.image_shape == (3, 12, 16)
    assert batches(data, "train", FULL, 0)[0].x.shape == (3, 3, 12, 16)
    (folder / "val" / "dog" / "1.jpg").write_bytes(encode(pixels(0), "JPEG"))
    with pytest.raises(UserError, match="set image_size"):
        batches(data, "val", Augment(), 0)


def test_an_epoch_may_be_left_early(folder: Path, cache_dir: Path) -> None:
    data = streamed(folder, cache_dir, workers=2)
    loader = make_loader(
        data, "train", batch_size=2, device=torch.device("cpu"), seed=1, augment=FULL, drop_last=True
    )
    assert len(loader) == 10
    first = next(loader.epoch(0))
    again = next(loader.epoch(0))
    assert torch.equal(first.x, again.x)


def test_workers_outlive_a_signal_to_the_whole_group(folder: Path, cache_dir: Path) -> None:
    """A launcher sends it to data workers too, and the training process finishes its step first."""
    data = streamed(folder, cache_dir, workers=2)
    loader = make_loader(
        data, "train", batch_size=2, device=torch.device("cpu"), seed=1, augment=FULL, drop_last=True
    )
    others = multiprocessing.active_children()
    epoch = loader.epoch(0)
    got = [next(epoch), next(epoch)]  # both workers are at work
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    for worker in workers:
        for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            assert worker.pid is not None
            os.kill(worker.pid, signum)
    assert_same([*got, *epoch], list(loader.epoch(0)))


def test_mean_and_std_of_a_sample_are_cached(folder: Path, cache_dir: Path) -> None:
    data = streamed(folder, cache_dir)
    (sample,) = cache_dir.glob("*-sample.safetensors")
    in_memory = open_data(f"imagefolder:{folder}", image_size=8, cache_dir=cache_dir)
    assert data.mean == pytest.approx(in_memory.mean, abs=0.03)  # the centers differ a little
    sample_time = sample.stat().st_mtime_ns
    assert streamed(folder, cache_dir).mean == data.mean
    assert sample.stat().st_mtime_ns == sample_time


def test_a_set_like_imagenet_takes_its_constants(tmp_path: Path, cache_dir: Path) -> None:
    image = encode(pixels(0))
    for number in range(1000):
        path = tmp_path / "set" / "train" / f"n{number:04}" / "0.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(image)
    for number in range(2):
        path = tmp_path / "set" / "val" / f"n{number:04}" / "0.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(image)
    data = streamed(tmp_path / "set", cache_dir)
    assert data.mean == (0.485, 0.456, 0.406)
    assert data.std == (0.229, 0.224, 0.225)
    assert not cache_dir.exists()
