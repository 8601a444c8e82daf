"""Operations on batches of images, and what draws them, against Pillow on one image after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from clicktrain.data import Augment, RandAugment, TrivialAugment, make_loader, open_data, seeded_generator
from clicktrain.data import image_operations as ops
from clicktrain.data.augment import augment_and_normalize
from clicktrain.data.draws import Draws, Part
from clicktrain.data.policies import OPERATIONS, apply
from clicktrain.errors import UserError

FILL = (10, 200, 30)


def images(channels: int = 3, height: int = 9, width: int = 13) -> Tensor:
    """Random ones, one with few values, one of a single color, one half of one color, one black and white."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (6, channels, height, width), dtype=torch.uint8, generator=generator)
    x[1] = x[1] // 4 + 60
    x[2] = 77
    x[3, :, :, :6] = 3
    x[4] = (x[4] > 128) * 255
    return x


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy() if len(image) == 3 else image[0].numpy())


def tensor(image: Image.Image) -> Tensor:
    values = torch.from_numpy(np.array(image))
    return values.permute(2, 0, 1) if values.ndim == 3 else values[None]


def fill_of(channels: int) -> Any:
    return FILL if channels == 3 else FILL[0]


def each(x: Tensor, operation: Callable[..., Image.Image], *amounts: Tensor) -> Tensor:
    values = zip(*(amount.tolist() for amount in amounts), strict=True) if amounts else [()] * len(x)
    return torch.stack([tensor(operation(pil(image), *own)) for image, own in zip(x, values, strict=True)])


def assert_close(made: Tensor, wanted: Tensor) -> None:
    """Equal but for rounding: Pillow rounds interpolated values down, we round them to the nearest."""
    assert made.dtype == torch.uint8
    assert int((made.int() - wanted.int()).abs().max()) <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["Brightness", "Color", "Contrast", "Sharpness"])
def test_enhancements_are_pillows(name: str, channels: int) -> None:
    x, factor = images(channels), torch.tensor([0.1, 0.5, 1.0, 1.9, 1.3, 0.0], dtype=torch.float64)
    wanted = each(x, lambda image, value: getattr(ImageEnhance, name)(image).enhance(value), factor)
    assert torch.equal(getattr(ops, name.lower())(x, factor), wanted)


@pytest.mark.parametrize("channels", [1, 3])
def test_operations_on_values_are_pillows(channels: int) -> None:
    x = images(channels)
    assert torch.equal(ops.autocontrast(x), each(x, ImageOps.autocontrast))
    assert torch.equal(ops.equalize(x), each(x, ImageOps.equalize))
    bits = torch.tensor([8, 4, 1, 2, 5, 7])
    assert torch.equal(ops.posterize(x, bits), each(x, ImageOps.posterize, bits))
    threshold = torch.tensor([256, 128, 0, 17, 200, 255])
    assert torch.equal(ops.solarize(x, threshold), each(x, ImageOps.solarize, threshold))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(9, 13), (8, 8)])
def test_moved_pixels_are_pillows(channels: int, size: tuple[int, int]) -> None:
    x, fill = images(channels, *size), torch.tensor(FILL[:channels], dtype=torch.uint8)
    degrees = torch.tensor([0, 30, -30, 135, 12, 7.5], dtype=torch.float64)
    turned = each(
        x,
        lambda image, value: image.rotate(
            value, resample=Image.Resampling.BILINEAR, fillcolor=fill_of(channels)
        ),
        degrees,
    )
    assert_close(ops.transform(x, ops.rotation(degrees, *size), fill), turned)
    amount = torch.tensor([0, 0.3, -0.3, 0.99, -0.99, 0.1], dtype=torch.float64)
    none, pixels = torch.zeros_like(amount), (amount * 9).round()
    pairs = ((amount, none), (none, amount), (pixels, none), (none, pixels))
    makers = (ops.shear, ops.shear, ops.translation, ops.translation)
    for make, (along_x, along_y) in zip(makers, pairs, strict=True):
        matrices = make(along_x, along_y)
        assert_close(ops.transform(x, matrices, fill), each(x, affine(channels), *matrices.flatten(1).T))


def affine(channels: int) -> Callable[..., Image.Image]:
    bilinear, fill = Image.Resampling.BILINEAR, fill_of(channels)

    def moved(image: Image.Image, *matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=bilinear, fillcolor=fill)

    return moved


def changed(image: Image.Image, name: str, share: float, sign: int, wide: bool) -> Image.Image:
    """The operation of that name at a share of its full strength, as the papers describe it."""
    width, height = image.size
    turn, slant, lift, bits = (135, 0.99, 0.99, 6) if wide else (30, 0.3, 0.9, 4)
    shift = {"x": width, "y": height}[name[-1:]] if name.startswith("translate") else 0
    shift = round(share * (min(shift, 32) if wide else shift * 150 / 331)) * sign
    along = {"shear x": (0, 1), "shear y": (1, 0), "translate x": (0, 0), "translate y": (0, 0)}
    if name == "identity":
        return image
    if name == "rotate":
        return image.rotate(sign * turn * share, resample=Image.Resampling.BILINEAR, fillcolor=FILL)
    if name in along:
        row = along[name][1] * sign * slant * share, along[name][0] * sign * slant * share
        moved = (shift, 0) if name == "translate x" else (0, shift)
        matrix = (1, row[0], moved[0], row[1], 1, moved[1])
        return affine(3)(image, *matrix)
    if name == "posterize":
        return ImageOps.posterize(image, 8 - round(bits * share))
    if name == "solarize":
        return image.point([v if v < 256 - 256 * share else 255 - v for v in range(256)] * 3)
    if name in ("autocontrast", "equalize"):
        return getattr(ImageOps, name)(image)
    return getattr(ImageEnhance, name.capitalize())(image).enhance(1 + sign * lift * share)


def many(count: int = 60, height: int = 16, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def assert_mostly(made: Tensor, wanted: Tensor) -> None:
    """Rounding may be amplified by a later operation (solarize, equalize) in single pixels only."""
    off = (made.int() - wanted.int()).abs() > 1
    assert float(off.float().mean()) < 0.02


@pytest.mark.parametrize(
    "policy",
    [
        RandAugment(operations=1, magnitude=10),
        RandAugment(operations=2, magnitude=6, deviation=0.5, probability=0.5),
    ],
)
def test_randaugment_image_by_image(policy: RandAugment) -> None:
    x, fill = many(), torch.tensor(FILL, dtype=torch.uint8)
    made = policy(x, fill, Draws(seeded_generator("test", 3)))
    generator, count = seeded_generator("test", 3), len(x)
    wanted = [pil(image) for image in x]
    for _ in range(policy.operations):
        kinds = torch.randint(0, 14, (count,), generator=generator).tolist()
        negative = (torch.rand(count, generator=generator) < 0.5).tolist()
        shares = [policy.magnitude / 10] * count
        if policy.deviation:
            noise = torch.randn(count, generator=generator, dtype=torch.float64).tolist()
            shares = [
                min(max(s + policy.deviation * n / 10, 0), 1) for s, n in zip(shares, noise, strict=True)
            ]
        done = [True] * count
        if policy.probability < 1:
            done = (torch.rand(count, generator=generator) < policy.probability).tolist()
        drawn = zip(wanted, kinds, shares, negative, done, strict=True)
        wanted = [
            changed(image, OPERATIONS[kind], share, -1 if minus else 1, False) if on else image
            for image, kind, share, minus, on in drawn
        ]
    reference = torch.stack([tensor(image) for image in wanted])
    if policy.operations == 1:
        assert_close(made, reference)
    assert_mostly(made, reference)


def test_trivialaugment_image_by_image() -> None:
    x, fill = many(), torch.tensor(FILL, dtype=torch.uint8)
    made = TrivialAugment()(x, fill, Draws(seeded_generator("test", 4)))
    generator = seeded_generator("test", 4)
    kinds = torch.randint(0, 14, (len(x),), generator=generator).tolist()
    negative = (torch.rand(len(x), generator=generator) < 0.5).tolist()
    shares = [n / 30 for n in torch.randint(0, 31, (len(x),), generator=generator).tolist()]
    wanted = [
        tensor(changed(pil(image), OPERATIONS[kind], share, -1 if minus else 1, True))
        for image, kind, share, minus in zip(x, kinds, shares, negative, strict=True)
    ]
    assert_close(made, torch.stack(wanted))


def test_no_strength_is_no_change_where_there_is_a_strength() -> None:
    x, fill = many(14), torch.tensor(FILL, dtype=torch.uint8)
    made = apply(x, torch.arange(14), torch.zeros(14, dtype=torch.float64), fill)
    other = {name for name, one, own in zip(OPERATIONS, made, x, strict=True) if not torch.equal(one, own)}
    assert other <= {"equalize", "autocontrast"}


def test_augmentation_rounds_resized_crops_before_a_policy_and_fills_with_the_mean() -> None:
    x = many(40, 10, 10)
    mean, std = torch.tensor([0.2, 0.5, 0.8]), torch.tensor([0.3, 0.2, 0.1])
    augment = Augment(resized_crop=True, policy=TrivialAugment())
    before = x.clone()
    made = augment_and_normalize(x, augment, mean, std, Draws(seeded_generator("test", 5)))
    assert torch.equal(x, before)
    pixels = made * std.view(-1, 1, 1) * 255 + mean.view(-1, 1, 1) * 255
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)
    filled = (pixels.round() == torch.tensor([51, 128, 204]).view(-1, 1, 1)).all(dim=1)
    assert int(filled.flatten(1).sum(1).max()) > 20  # somewhere an image was moved by much


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("policy", [RandAugment(deviation=1, probability=0.7), TrivialAugment()])
def test_parts_of_a_batch_see_what_the_whole_would(policy: Any, count: int) -> None:
    data = open_data("synthetic:classes=3,size=9,train=26,val=9")
    augment = Augment(crop_padding=1, flip=True, policy=policy, erasing=0.6)
    settings: dict[str, Any] = {"batch_size": 12, "augment": augment, "drop_last": True, "seed": 0}
    settings["device"] = torch.device("cpu")
    (_, whole) = list(make_loader(data, "train", **settings).epoch(2))
    parts = [
        next(make_loader(data, "train", part=Part(index, count), **settings).epoch(2, 1))
        for index in range(count)
    ]
    assert torch.equal(torch.cat([part.x for part in parts]), whole.x)
    assert torch.equal(torch.cat([part.y for part in parts]), whole.y)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"magnitude": 11}, "randaugment_magnitude is 11: must be between 0 and 10"),
        ({"operations": 0}, "randaugment_operations is 0: must be between 1 and 100"),
        ({"probability": 0.0}, "randaugment_probability is 0: must be above 0 and at most 1"),
    ],
)
def test_impossible_strengths_are_named(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        RandAugment(**settings)


@pytest.mark.gpu
def test_a_gpu_makes_the_same_changes() -> None:
    x, fill = many(), torch.tensor(FILL, dtype=torch.uint8)
    for policy in (RandAugment(magnitude=8), TrivialAugment()):
        made = policy(x, fill, Draws(seeded_generator("test", 6)))
        there = policy(x.cuda(), fill.cuda(), Draws(seeded_generator("test", 6))).cpu()
        assert_mostly(there, made)
