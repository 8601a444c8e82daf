"""Repeated augmentation: which images make which batch, and how their copies differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_files import pixels
from PIL import Image

from clicktrain.data import Augment, ImageData, Part, PixelSource, make_loader, open_data
from clicktrain.data.loader import BatchPlan

CPU = torch.device("cpu")


@given(
    num_images=st.integers(1, 50),
    batch_size=st.integers(1, 16),
    repeats=st.integers(1, 5),
    epoch=st.integers(0, 9),
)
def test_each_image_of_an_epoch_is_in_one_batch_that_often(
    num_images: int, batch_size: int, repeats: int, epoch: int
) -> None:
    plan = BatchPlan(num_images, batch_size, False, True, 0, repeats=repeats)
    order, copies = plan.order(epoch), plan.copies()
    drawn = BatchPlan(num_images, batch_size, False, True, 0).order(epoch)
    assert len(order) == num_images
    pairs = list(zip(order.tolist(), copies.tolist(), strict=True))
    # the slow reference: copies side by side, cut into batches, each sorted by the place among its copies
    line = [(int(drawn[place // repeats]), place % repeats) for place in range(num_images)]
    for batch in range(len(plan)):
        rows = plan.rows(batch)
        own = line[rows]
        assert pairs[rows] == [pair for first in range(repeats) for pair in own[first::repeats]]
    if batch_size % repeats == 0:
        for batch in range(num_images // batch_size):
            counts = torch.bincount(order[plan.rows(batch)])
            assert set(counts.tolist()) <= {0, repeats}


def loader(data: ImageData, **settings: Any) -> Any:
    arguments: dict[str, Any] = {"batch_size": 6, "device": CPU, "augment": Augment(), "drop_last": True}
    return make_loader(data, "train", **({"seed": 0} | arguments | settings))


def test_copies_differ_and_an_epoch_has_as_many_batches() -> None:
    data = open_data("synthetic:classes=3,size=12,train=24,val=6")
    augment = Augment(crop_padding=2)
    batches = list(loader(data, augment=augment, repeats=3).epoch(0))
    assert len(batches) == 4
    assert sum(len(batch.x.flatten(1).unique(dim=0)) for batch in batches) > 20
    plain = list(loader(data, repeats=3).epoch(0))
    assert [len(batch.x.flatten(1).unique(dim=0)) for batch in plain] == [2] * 4
    late = list(loader(data, augment=augment, repeats=3).epoch(0, 2))
    assert all(torch.equal(one.x, other.x) for one, other in zip(late, batches[2:], strict=True))


def test_processes_have_different_copies_of_the_same_batch() -> None:
    images = torch.arange(24, dtype=torch.uint8).view(-1, 1, 1, 1).expand(24, 1, 2, 2).contiguous()
    source = PixelSource(images, torch.arange(24) % 2)
    data = ImageData("numbered", ("a", "b"), (1, 2, 2), (0.0,), (1 / 255,), source, source)
    whole = next(loader(data, repeats=2).epoch(0)).x[:, 0, 0, 0].round().tolist()
    parts = [next(loader(data, repeats=2, part=Part(i, 2)).epoch(0)).x[:, 0, 0, 0] for i in (0, 1)]
    assert torch.cat(parts).round().tolist() == whole
    assert set(parts[0].round().tolist()) == set(parts[1].round().tolist())


def test_alternating_flips_take_turns_among_copies() -> None:
    pair = torch.tensor([0, 1], dtype=torch.uint8).view(1, 1, 1, 2).expand(12, 1, 1, 2).contiguous()
    source = PixelSource(pair, torch.arange(12))
    data = ImageData("pairs", tuple(map(str, range(12))), (1, 1, 2), (0.0,), (1 / 255,), source, source)
    augment = Augment(alternating=True)
    for x, y in loader(data, augment=augment, repeats=2).epoch(0):
        mirrored = x[:, 0, 0, 0] > 0.5
        assert all(int(mirrored[y == image].sum()) == 1 for image in y.unique())


def test_streamed_copies_are_cropped_differently_and_the_first_as_before(tmp_path: Path) -> None:
    for index in range(8):
        folder = tmp_path / "train" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(index, (40, 30))).save(folder / f"{index}.png")
    data = open_data(f"imagefolder:{tmp_path}", image_size=16, val_fraction=0.25, workers=0)
    augment = Augment(resized_crop=True)
    settings: dict[str, Any] = {"augment": augment, "drop_last": False, "batch_size": 6}
    (repeated,) = loader(data, repeats=2, **settings).epoch(1)
    (plain,) = loader(data, **settings).epoch(1)
    firsts, seconds = repeated.x[:3], repeated.x[3:]
    assert torch.equal(repeated.y[:3], repeated.y[3:])
    assert all((one - other).abs().max() > 0.1 for one, other in zip(firsts, seconds, strict=True))
    assert all(any(torch.equal(one, other) for other in plain.x) for one in firsts)


@pytest.mark.parametrize("split", ["val"])
def test_other_splits_are_not_repeated(split: Any) -> None:
    data = open_data("synthetic:classes=2,size=8,train=8,val=6")
    (batch,) = make_loader(
        data, split, batch_size=6, device=CPU, augment=Augment(), drop_last=False, seed=0, repeats=3
    ).epoch(0)
    assert len(batch.x.flatten(1).unique(dim=0)) == 6
