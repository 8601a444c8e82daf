from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clicktrain.data import Augment, mixup, seeded_generator
from clicktrain.data.augment import (
    augment_and_normalize,
    mirrored_in_epoch,
    random_boxes,
    random_crop,
    random_flip,
    random_resized_crop,
)
from clicktrain.data.draws import Draws
from clicktrain.data.erasing import cutout
from clicktrain.errors import UserError


def images(batch: int = 4, channels: int = 3, height: int = 6, width: int = 5) -> Tensor:
    shape = (batch, channels, height, width)
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@given(
    padding=st.integers(1, 4),
    mode=st.sampled_from(["zeros", "reflect"]),
    height=st.integers(5, 9),
    width=st.integers(5, 9),
    seed=st.integers(0, 1000),
)
def test_every_crop_is_a_window_of_the_padded_image(
    padding: int, mode: str, height: int, width: int, seed: int
) -> None:
    x = images(3, 2, height, width)
    cropped = random_crop(x, padding, mode, Draws(seeded_generator("test", seed)))  # type: ignore[arg-type]
    # the slow, obvious reference: the same offsets, one image after the other
    offsets = torch.randint(0, 2 * padding + 1, (2, 3), generator=seeded_generator("test", seed))
    pad_mode = {"zeros": "constant", "reflect": "reflect"}[mode]
    padded = F.pad(x.float(), (padding,) * 4, mode=pad_mode).to(torch.uint8)
    for index, (top, left) in enumerate(offsets.T.tolist()):
        assert torch.equal(cropped[index], padded[index, :, top : top + height, left : left + width])


def test_all_offsets_of_a_crop_occur() -> None:
    x = torch.zeros(2000, 1, 3, 3, dtype=torch.uint8)
    x[:, :, 1, 1] = 1
    cropped = random_crop(x, 1, "zeros", Draws(seeded_generator("test")))
    share = cropped.float().mean(0)[0]  # where the middle pixel went
    assert torch.all((share - 1 / 9).abs() < 0.03)


def test_half_of_the_images_are_mirrored_whole() -> None:
    x = images(1000, 1, 2, 3)
    flipped = random_flip(x, Draws(seeded_generator("test")))
    is_same = (flipped == x).flatten(1).all(1)
    is_mirrored = (flipped == x.flip(-1)).flatten(1).all(1)
    assert bool((is_same | is_mirrored).all())
    assert 420 < int(is_mirrored.sum()) < 580


def test_alternating_flips_mirror_each_image_in_every_other_epoch() -> None:
    first, second, third = (mirrored_in_epoch(1000, 3, epoch) for epoch in range(3))
    assert torch.equal(first, ~second)
    assert torch.equal(first, third)
    assert 420 < int(first.sum()) < 580
    assert not torch.equal(first, mirrored_in_epoch(1000, 4, 0))
    x = images(1000, 1, 2, 3)
    augment, zero, one = Augment(alternating=True), torch.zeros(1), torch.ones(1) / 255
    made = augment_and_normalize(x, augment, zero, one, Draws(seeded_generator("test")), first)
    assert torch.equal(made, torch.where(first.view(-1, 1, 1, 1), x.flip(-1), x).float())


@given(height=st.integers(1, 60), width=st.integers(1, 60), seed=st.integers(0, 1000))
def test_boxes_lie_inside_with_the_area_and_aspect_of_the_recipe(height: int, width: int, seed: int) -> None:
    top, left, box_height, box_width = random_boxes(
        50, height, width, Draws(seeded_generator("test", seed))
    ).unbind(1)
    assert bool(((top >= 0) & (left >= 0) & (box_height > 0) & (box_width > 0)).all())
    assert bool(((top + box_height <= height) & (left + box_width <= width)).all())
    if min(height, width) >= 30 and max(height, width) <= 1.2 * min(height, width):
        area = box_height * box_width / (height * width)
        aspect = box_width / box_height
        assert float(area.min()) > 0.06  # 8%, but for rounding
        assert float(aspect.min()) > 0.66
        assert float(aspect.max()) < 1.5


def test_no_box_fits_a_very_long_image_so_the_center_is_taken() -> None:
    assert random_boxes(2, 2, 300, Draws(seeded_generator("test"))).tolist() == [[0, 148, 2, 3]] * 2
    assert random_boxes(1, 300, 3, Draws(seeded_generator("test"))).tolist() == [[148, 0, 4, 3]]


def test_a_resized_crop_agrees_with_interpolating_the_box() -> None:
    x = images(20, 2, 24, 24)
    cropped = random_resized_crop(x, Draws(seeded_generator("test")))
    boxes = random_boxes(20, 24, 24, Draws(seeded_generator("test")))
    for index, (top, left, height, width) in enumerate(boxes.tolist()):
        box = x[index : index + 1, :, top : top + height, left : left + width].float()
        alone = F.interpolate(box, size=(24, 24), mode="bilinear", align_corners=False)[0]
        # at the box's edge the batch version looks at the pixels around it, so compare inside
        torch.testing.assert_close(cropped[index, :, 3:-3, 3:-3], alone[:, 3:-3, 3:-3], atol=0.05, rtol=0)


def test_cutout_clears_a_square_that_may_lie_half_outside() -> None:
    holes = cutout(torch.ones(500, 2, 8, 8), 4, Draws(seeded_generator("test"))) == 0
    assert torch.equal(holes[:, 0], holes[:, 1])
    heights = holes[:, 0].any(2).sum(1)
    widths = holes[:, 0].any(1).sum(1)
    assert torch.equal(holes[:, 0].sum((1, 2)), heights * widths)  # rectangles
    assert set(heights.tolist()) == {2, 3, 4}
    assert bool(holes[:, 0].any(0).all())  # every pixel is hit by some


def test_nothing_but_the_normalization_by_default() -> None:
    x = images()
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    normal = augment_and_normalize(x, Augment(), mean, std, Draws(seeded_generator("test")))
    expected = (x.double() / 255 - mean.double().view(3, 1, 1)) / std.double().view(3, 1, 1)
    torch.testing.assert_close(normal.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_input_is_left_as_it_was() -> None:
    x = images(8, 3, 8, 8)
    before = x.clone()
    for augment in (Augment.preset("cifar"), Augment.preset("imagenet"), Augment(cutout=3, flip=True)):
        augment_and_normalize(x, augment, torch.zeros(3), torch.ones(3), Draws(seeded_generator("test")))
    assert torch.equal(x, before)


def test_presets_are_the_usual_recipes() -> None:
    assert Augment.preset("none") == Augment()
    assert Augment.preset("cifar") == Augment(crop_padding=4, flip=True, padding="zeros")
    assert Augment.preset("imagenet") == Augment(resized_crop=True, flip=True)
    assert Augment.preset("digits") == Augment(crop_padding=1, flip=False)
    with pytest.raises(UserError, match="'cifra' is unknown; none, cifar, cifarnet, imagenet, digits exist"):
        Augment.preset("cifra")


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        ({"crop_padding": -1}, "crop_padding=-1"),
        ({"cutout": -2}, "cutout=-2"),
        ({"padding": "mirror"}, "'mirror' is unknown"),
        ({"crop_padding": 4, "resized_crop": True}, "choose one"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, int], fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        Augment(**settings)  # type: ignore[arg-type]


@given(alpha=st.floats(1e-3, 20), seed=st.integers(0, 10**6))
def test_mixup_blends_images_and_labels_by_the_same_share(alpha: float, seed: int) -> None:
    # each image holds its own number, so that the blend tells who was mixed with whom
    x = torch.arange(6, dtype=torch.float64).view(6, 1, 1, 1)
    y = torch.arange(6)
    mixed, targets = mixup(x, y, 6, alpha, seeded_generator("mixup", seed))
    torch.testing.assert_close(targets.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(targets @ x.flatten(), mixed.flatten())
    assert bool((targets >= 0).all())


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixup_draws_its_share_from_a_beta_distribution(alpha: float) -> None:
    x, y = torch.zeros(16, 1, 1, 1), torch.arange(16)
    generator = seeded_generator("mixup", 5)
    shares = []
    for _ in range(600):
        _, targets = mixup(x, y, 16, alpha, generator)
        shares.append(float(targets.diagonal().min()))  # images that were mixed with themselves have 1
    values = torch.tensor(shares, dtype=torch.float64)
    assert abs(float(values.mean()) - 0.5) < 0.05
    assert abs(float(values.var()) - 1 / (4 * (2 * alpha + 1))) < 0.015  # of Beta(a, a)


def test_mixup_of_zero_is_off_and_negative_is_an_error() -> None:
    x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 2, 1])
    mixed, targets = mixup(x, y, 3, 0.0, seeded_generator("mixup"))
    assert torch.equal(mixed, x)
    assert torch.equal(targets, F.one_hot(y, 3).float())
    with pytest.raises(UserError, match=r"mixup=-0\.5"):
        mixup(x, y, 3, -0.5, seeded_generator("mixup"))


def test_streams_differ_by_purpose_and_key() -> None:
    keys = [("order", 0, 1), ("order", 1, 0), ("order", 0, 11), ("order", 0), ("augment", 0, 1)]
    draws = [torch.rand(4, generator=seeded_generator(*key)) for key in keys]  # type: ignore[arg-type]
    assert len({tuple(draw.tolist()) for draw in draws}) == len(keys)
    assert torch.equal(draws[0], torch.rand(4, generator=seeded_generator("order", 0, 1)))
