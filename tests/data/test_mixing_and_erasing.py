"""CutMix, mixing of batches and random erasing, pixel by pixel."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clicktrain.data import Augment, Mixing, cutmix, mixup, seeded_generator
from clicktrain.data.augment import augment_and_normalize
from clicktrain.data.draws import Draws
from clicktrain.data.erasing import erased_boxes, random_erasing
from clicktrain.data.mixing import _beta_draw
from clicktrain.errors import UserError


def numbered(count: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Images that hold their own number in every pixel, so that a box shows where it comes from."""
    y = torch.arange(count)
    return y.double().view(-1, 1, 1, 1).expand(count, 2, height, width).contiguous(), y


@given(alpha=st.floats(0.05, 5), height=st.integers(1, 6), width=st.integers(1, 6), seed=st.integers(0, 999))
def test_cutmix_image_by_image(alpha: float, height: int, width: int, seed: int) -> None:
    """Yun et al., section 3.1, in plain loops over the same draws."""
    x, y = numbered(3, height, width)
    mixed, targets = cutmix(x, y, 4, alpha, seeded_generator("test", seed))
    generator = seeded_generator("test", seed)
    side = math.sqrt(1 - _beta_draw(alpha, generator))
    box = []
    for size in (height, width):
        center, length = int(torch.randint(size, (), generator=generator)), int(size * side)
        inside = [i for i in range(size) if center - length // 2 <= i < center - length // 2 + length]
        box.append(inside)
    other = torch.randperm(3, generator=generator).tolist()
    values = mixed[:, 0].tolist()
    for image in range(3):
        own = 0
        for row in range(height):
            for column in range(width):
                cut = row in box[0] and column in box[1]
                own += not cut
                assert values[image][row][column] == (other[image] if cut else image)
        label = [0.0] * 4
        label[image] += own / (height * width)
        label[other[image]] += 1 - own / (height * width)
        assert targets[image].tolist() == pytest.approx(label)
    assert torch.equal(mixed[:, 0], mixed[:, 1])


def test_cutmix_keeps_the_memory_order_and_leaves_the_batch_alone() -> None:
    x = torch.rand(4, 3, 6, 6).to(memory_format=torch.channels_last)
    before = x.clone()
    mixed, _ = cutmix(x, torch.arange(4), 4, 1.0, seeded_generator("test"))
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)
    with pytest.raises(UserError, match="cutmix=-1 is negative; 0 turns it off, 1 is usual"):
        cutmix(x, torch.arange(4), 4, -1, seeded_generator("test"))


def test_half_of_the_mixed_batches_are_cut_and_some_are_left() -> None:
    x, y = numbered(6, 8, 8)
    mixing = Mixing(mixup=1.0, cutmix=1.0, probability=0.8)
    kinds = []
    for seed in range(250):
        mixed, targets = mixing(x, y, 6, seeded_generator("test", seed))
        assert targets.sum(1).tolist() == pytest.approx([1.0] * 6)
        whole = mixed.flatten(1).std(1) == 0
        kinds.append("none" if torch.equal(mixed, x) else "mixup" if bool(whole.all()) else "cutmix")
    shares = {kind: kinds.count(kind) / len(kinds) for kind in ("none", "mixup", "cutmix")}
    assert abs(shares["none"] - 0.2) < 0.09
    assert abs(shares["mixup"] - 0.4) < 0.09


def test_mixup_alone_draws_what_it_always_has() -> None:
    x, y = numbered(6, 3, 3)
    alone = mixup(x, y, 6, 0.3, seeded_generator("test", 1))
    mixed = Mixing(mixup=0.3)(x, y, 6, seeded_generator("test", 1))
    assert all(torch.equal(one, other) for one, other in zip(alone, mixed, strict=True))
    assert not Mixing()
    assert Mixing(mixup=0.1, cutmix=1).describe() == "mixup (alpha 0.1) or cutmix (alpha 1)"


@given(height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 999))
def test_erased_boxes_are_drawn_as_written(height: int, width: int, seed: int) -> None:
    boxes = erased_boxes(4, height, width, Draws(seeded_generator("test", seed)))
    generator = seeded_generator("test", seed)
    sizes = torch.rand(2, 4, 10, generator=generator, dtype=torch.float64).tolist()
    places = torch.rand(2, 4, generator=generator, dtype=torch.float64).tolist()
    for image in range(4):
        wanted = [0, 0, 0, 0]
        for attempt in range(10):
            area = height * width * (0.02 + 0.38 * sizes[0][image][attempt])
            aspect = 0.3 + (1 / 0.3 - 0.3) * sizes[1][image][attempt]
            high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if high <= height and wide <= width:
                top = math.floor(places[0][image] * (height - high + 1))
                wanted = [top, math.floor(places[1][image] * (width - wide + 1)), high, wide]
                break
        assert boxes[image, 2:].tolist() == wanted[2:]
        assert not any(wanted[2:]) or boxes[image].tolist() == wanted


@pytest.mark.parametrize("fill", ["random", "mean"])
def test_erasing_image_by_image(fill: str) -> None:
    mean, std = torch.tensor([0.2, 0.4]), torch.tensor([0.5, 0.25])
    x = torch.full((40, 2, 12, 10), 9.0)
    made = random_erasing(x, 0.5, fill, mean, std, Draws(seeded_generator("test", 2)))  # type: ignore[arg-type]
    assert torch.equal(x, torch.full_like(x, 9.0))
    generator = seeded_generator("test", 2)
    boxes = erased_boxes(40, 12, 10, Draws(generator))
    erased = torch.rand(40, generator=generator) < 0.5
    seeds = torch.randint(0, 2**62, (40,), generator=generator).tolist()
    for image, (top, left, height, width) in enumerate(boxes.tolist()):
        wanted = torch.full((2, 12, 10), 9.0)
        if erased[image] and height and width:
            box = torch.zeros(2, height, width)
            if fill == "random":
                stream = torch.Generator().manual_seed(seeds[image])
                bytes_ = torch.randint(0, 256, (2, height * width), dtype=torch.uint8, generator=stream)
                box = (bytes_.view(2, height, width) / 255 - mean.view(2, 1, 1)) / std.view(2, 1, 1)
            wanted[:, top : top + height, left : left + width] = box
        torch.testing.assert_close(made[image], wanted)
    assert 8 < int(erased.sum()) < 32


def test_erasing_is_part_of_the_augmentation_and_comes_last() -> None:
    x = torch.full((30, 1, 8, 8), 100, dtype=torch.uint8)
    augment = Augment(erasing=1.0, erasing_fill="mean")
    mean, std = torch.tensor([0.1]), torch.tensor([0.5])
    made = augment_and_normalize(x, augment, mean, std, Draws(seeded_generator("test")))
    assert bool((made == 0).flatten(1).any(1).all())
    with pytest.raises(UserError, match=r"erasing=1\.5 is no probability"):
        Augment(erasing=1.5)
