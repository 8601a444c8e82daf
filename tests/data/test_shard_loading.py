"""Shards give the images that were written, in batches that no number of processes or workers changes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from image_files import encode, pixels
from shard_files import opened, write_groups, write_shards, write_tar

from clicktrain.data import Augment, Batch, ImageData, Part, ShardSource, make_loader, open_data
from clicktrain.data.loader import BatchPlan
from clicktrain.data.shards.loader import ShardStream, mirrored_numbers
from clicktrain.errors import UserError

SIZES = (20, 65, 4, 31)
KINDS = ("webdataset", "parquet-shards")
FLIPPED, FULL = Augment(flip=True, cutout=2), Augment(resized_crop=True, flip=True, cutout=2)
WHOLE = Part()


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clicktrain.data.shards.tar.PIECE", 16)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, kind: str) -> Path:
    write_shards(kind, tmp_path / "set", SIZES)
    write_shards(kind, tmp_path / "set", (30, 11), split="val", seed=1000)
    return tmp_path / "set"


def epoch(
    data: ImageData, split: Literal["train", "val", "test"] = "train", *, number: int = 0, start: int = 0,
    part: Part = WHOLE, augment: Augment = FLIPPED, batch_size: int = 12, drop_last: bool = False,
) -> list[Batch]:  # fmt: skip
    loader = make_loader(
        data, split, batch_size=batch_size, device=torch.device("cpu"), seed=1, augment=augment,
        drop_last=drop_last, part=part,
    )  # fmt: skip
    return list(loader.epoch(number, start))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.y, other.y)


def raw(data: ImageData, batches: list[Batch]) -> list[bytes]:
    """The pixels of each image, as they were before they were normalized."""
    x = torch.cat([batch.x for batch in batches])
    values = (x * data.std[0] + data.mean[0]) * 255
    return [image.numpy().tobytes() for image in values.round().to(torch.uint8)]


def test_an_epoch_has_every_image_once_with_its_label(kind: str, folder: Path, cache_dir: Path) -> None:
    data = opened(kind, folder, cache_dir, workers=0, shuffle_buffer=50)
    assert data.image_shape == (1, 8, 8)
    assert (
        "120 training and 41 validation images, 3 classes, 8x8 gray, streamed from 4 shards"
        in data.describe()
    )
    written = {pixels(seed, channels=1).tobytes(): seed % 3 for seed in range(120)}
    batches = epoch(data, augment=Augment())
    labels = torch.cat([batch.y for batch in batches]).tolist()
    assert list(zip(raw(data, batches), labels, strict=True)) != list(written.items())
    assert dict(zip(raw(data, batches), labels, strict=True)) == written
    val = epoch(data, "val")
    assert raw(data, val) == [pixels(seed, channels=1).tobytes() for seed in range(1000, 1041)]
    assert torch.cat([batch.y for batch in val]).tolist() == [seed % 3 for seed in range(1000, 1041)]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches_of_one(kind: str, folder: Path, cache_dir: Path, processes: int) -> None:
    data = opened(kind, folder, cache_dir, workers=0, shuffle_buffer=50)
    parts = [Part(index, processes) for index in range(processes)]
    shares = [epoch(data, part=part, number=2) for part in parts]
    together = [
        Batch(torch.cat([batch.x for batch in own]), torch.cat([batch.y for batch in own]))
        for own in zip(*shares, strict=True)
    ]
    assert_same(together, epoch(data, number=2))
    val = epoch(data, "val")
    for index, part in enumerate(parts):
        assert_same(epoch(data, "val", part=part), val[index::processes])


def test_an_epoch_goes_on_anywhere_with_any_number_of_workers(
    kind: str, folder: Path, cache_dir: Path
) -> None:
    data = opened(kind, folder, cache_dir, workers=0, shuffle_buffer=50)
    whole = epoch(data, number=3, drop_last=True)
    assert len(whole) == 10
    for start in (0, 1, 4, 5, 9, 10):
        assert_same(epoch(data, number=3, start=start, drop_last=True), whole[start:])
    for start in (1, 3):
        assert_same(epoch(data, "val", start=start), epoch(data, "val")[start:])
    state = torch.get_rng_state()
    workers = opened(kind, folder, cache_dir, workers=2, shuffle_buffer=50)
    assert_same(
        epoch(workers, number=3, start=5, drop_last=True, augment=FULL),
        epoch(data, number=3, drop_last=True, augment=FULL)[5:],
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_larger_batches_keep_the_order(kind: str, folder: Path, cache_dir: Path) -> None:
    data = opened(kind, folder, cache_dir, workers=0, shuffle_buffer=20)
    small, large = (epoch(data, augment=Augment(), batch_size=size) for size in (12, 40))
    assert raw(data, small) == raw(data, large)


@pytest.mark.parametrize("buffer", [1, 16, 100, 1000])
@pytest.mark.parametrize("processes", [1, 3])
def test_what_is_in_memory_is_the_buffer_and_a_piece(
    kind: str, folder: Path, cache_dir: Path, buffer: int, processes: int
) -> None:
    source = opened(kind, folder, cache_dir, workers=0, shuffle_buffer=buffer).train
    assert isinstance(source, ShardSource)
    piece = int(source.pieces.counts.max())
    for index in range(processes):
        plan = BatchPlan(len(source), 12, False, True, 1, Part(index, processes))
        stream = ShardStream(source, plan, 0)
        assert sum(len(encoded.samples) for encoded in stream.batches(0)) == 120 // processes
        assert stream.most_held <= min(buffer, 120) + piece + 12


def test_thousands_of_images_in_little_memory_and_from_any_place(
    kind: str, tmp_path: Path, cache_dir: Path
) -> None:
    """4,000 images in 20 shards, of which 100 are different; nothing is decoded."""
    images = [encode(pixels(seed, channels=1)) for seed in range(100)]
    for shard in range(20):
        labels = [number % 7 for number in range(200)]
        if kind == "webdataset":
            write_tar(tmp_path / "set" / f"{shard}.tar", labels, images=images * 2)
        else:
            write_groups(tmp_path / "set" / f"{shard}.parquet", labels, images=images * 2, rows=50)
    source = opened(kind, tmp_path / "set", cache_dir, workers=0, shuffle_buffer=256, holdout=100).train
    assert isinstance(source, ShardSource)
    plan = BatchPlan(len(source), 64, True, True, 1)
    stream = ShardStream(source, plan, 5)
    whole = list(stream.batches(0))
    assert len(whole) == 60
    assert stream.most_held <= 256 + 50 + 64
    numbers = np.concatenate([encoded.numbers for encoded in whole])
    assert len(set(numbers.tolist())) == 60 * 64
    for processes, start in ((1, 59), (2, 31), (4, 7)):
        parts = [
            list(ShardStream(source, replace(plan, part=Part(index, processes)), 5).batches(start))
            for index in range(processes)
        ]
        for encoded, *own in zip(whole[start:], *parts, strict=True):
            assert [sample for part in own for sample in part.samples] == encoded.samples


def test_a_validation_split_is_held_out_where_there_is_none(
    kind: str, tmp_path: Path, cache_dir: Path
) -> None:
    write_shards(kind, tmp_path / "set", SIZES)
    data = opened(kind, tmp_path / "set", cache_dir, workers=0, val_fraction=0.25)
    assert (len(data.train), len(data.val), data.test) == (90, 30, None)
    seen = Counter(raw(data, epoch(data, augment=Augment())) + raw(data, epoch(data, "val")))
    assert seen == Counter(pixels(seed, channels=1).tobytes() for seed in range(120))


def test_holdout_leaves_the_validation_split_for_the_end(kind: str, folder: Path, cache_dir: Path) -> None:
    data = opened(kind, folder, cache_dir, workers=0, holdout=33, seed=4)
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (87, 33, 41)
    again = opened(kind, folder, cache_dir, workers=0, holdout=33, seed=4)
    assert raw(data, epoch(data, "val")) == raw(again, epoch(again, "val"))
    assert raw(data, epoch(data, "test")) == [pixels(s, channels=1).tobytes() for s in range(1000, 1041)]
    others = [opened(kind, folder, cache_dir, workers=0, holdout=33, seed=seed) for seed in (5, 6)]
    assert any(raw(data, epoch(data, "val")) != raw(other, epoch(other, "val")) for other in others)
    with pytest.raises(UserError, match="has 120 training images, of which some have to be left"):
        opened(kind, folder, cache_dir, workers=0, holdout=120)


def test_the_index_is_made_once_and_again_when_shards_change(
    kind: str, folder: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first = opened(kind, folder, cache_dir, workers=0)
    assert caplog.text.count("reading the index of the 6 shards") == 1
    again = opened(kind, folder, cache_dir, workers=0)
    assert caplog.text.count("reading the index") == 1
    assert_same(epoch(first), epoch(again))
    for path in cache_dir.glob("*.samples"):  # a file that was cut short is made again
        path.write_bytes(path.read_bytes()[:-1])
    assert_same(epoch(first), epoch(opened(kind, folder, cache_dir, workers=0)))
    write_shards(kind, folder, (30, 12), split="val", seed=1000)
    assert len(opened(kind, folder, cache_dir, workers=0).val) == 42


def test_processes_that_start_together_make_one_index(
    kind: str, folder: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with ThreadPoolExecutor(4) as pool:
        sizes = pool.map(lambda number: len(opened(kind, folder, cache_dir, workers=0).train), range(4))
        assert list(sizes) == [120] * 4
    assert caplog.text.count("reading the index") == 1


def test_an_epoch_may_be_left_early_and_leaves_no_thread(kind: str, folder: Path, cache_dir: Path) -> None:
    data = opened(kind, folder, cache_dir, workers=0, shuffle_buffer=20)
    loader = make_loader(
        data, "train", batch_size=12, device=torch.device("cpu"), seed=1, augment=FLIPPED, drop_last=True
    )
    batches = loader.epoch(0)
    assert isinstance(batches, Iterator)
    first = next(batches)
    assert any(thread.name == "shards" for thread in threading.enumerate())
    batches.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "shards" for thread in threading.enumerate())
    assert torch.equal(first.x, next(loader.epoch(0)).x)


def test_alternating_flips_mirror_half_of_the_images_in_turns() -> None:
    numbers = torch.arange(4000).numpy()
    first, second, third = (mirrored_numbers(numbers, 7, number) for number in range(3))
    assert 1800 < int(first.sum()) < 2200
    assert torch.equal(second, ~first)
    assert torch.equal(third, first)
    assert not torch.equal(mirrored_numbers(numbers, 8, 0), first)
    assert torch.equal(mirrored_numbers(numbers[5:9], 7, 0), first[5:9])


def test_images_are_resized_and_cropped_as_files_are(kind: str, tmp_path: Path, cache_dir: Path) -> None:
    images = [encode(pixels(seed, (10 + seed, 12)), "JPEG") for seed in range(8)]
    labels = [seed % 2 for seed in range(8)]
    if kind == "webdataset":
        write_tar(tmp_path / "set" / "train.tar", labels, images=images, image_kind="JPEG")
    else:
        write_groups(tmp_path / "set" / "train.parquet", labels, images=images)
    for label in (0, 1):
        (tmp_path / "files" / str(label)).mkdir(parents=True)
    for seed, data in enumerate(images):
        (tmp_path / "files" / str(seed % 2) / f"{seed}.jpg").write_bytes(data)
    shards = opened(kind, tmp_path / "set", cache_dir, image_size=8, workers=0, holdout=4)
    files = open_data(f"imagefolder:{tmp_path / 'files'}", image_size=8, cache_dir=cache_dir, memory_limit=0)
    assert shards.mean == pytest.approx(files.mean, abs=0.08)
    assert shards.image_shape == files.image_shape == (3, 8, 8)
    assert [batch.x.shape for batch in epoch(shards, batch_size=4)] == [(4, 3, 8, 8)]


@pytest.mark.parametrize(
    "names",
    [
        ("train-0.tar", "val-0.tar"),
        ("train000.tar", "val000.tar"),
        ("set_train_0.tar", "set_Validation_0.tar"),
        ("data/train-00000-of-00001.tar", "data/test-00000-of-00001.tar"),
        ("train/0.tar", "valid/0.tar"),
    ],
)
def test_names_of_files_and_folders_say_the_split(
    names: tuple[str, str], tmp_path: Path, cache_dir: Path
) -> None:
    for name, labels in zip(names, ([0, 1, 2, 0], [1, 2]), strict=True):
        write_tar(tmp_path / "set" / name, labels)
    data = opened("webdataset", tmp_path / "set", cache_dir, workers=0)
    assert (len(data.train), len(data.val)) == (4, 2)


def test_names_of_classes_come_along(tmp_path: Path, cache_dir: Path) -> None:
    write_groups(tmp_path / "p" / "train.parquet", [0, 1, 2] * 4, names=["x", "y", "z"])
    assert opened("parquet-shards", tmp_path / "p", cache_dir).classes == ("x", "y", "z")
    write_tar(tmp_path / "t" / "train" / "0.tar", [0, 1] * 4, label_kind="json")
    write_tar(tmp_path / "t" / "val" / "0.tar", [0, 1], label_kind="json")
    assert opened("webdataset", tmp_path / "t", cache_dir).classes == ("0", "1")
    (tmp_path / "t" / "classes.txt").write_text("cat\ndog\nhen\n")
    data = opened("webdataset", tmp_path / "t", cache_dir)
    assert (data.classes, len(data.train), len(data.val)) == (("cat", "dog", "hen"), 8, 2)
