"""``digits``: real handwritten digits of scikit-learn; ``synthetic:...``: drawn images."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.data.draws import seeded_generator
from clicktrain.data.listing import ListedSplit, Listing
from clicktrain.errors import UserError, shown
from clicktrain.limits import in_words

_PERIOD = 5  # every fifth digit of a class is for validation
_DEFAULTS = {"classes": 10, "size": 32, "channels": 3, "train": 512, "val": 128, "seed": 0}
_LEAST = {"classes": 2, "size": 1, "channels": 1, "train": 2, "val": 1, "seed": 0}
_DIGITS, _SEED_DIGITS = 9, 18
_CHUNK = 1024


def list_digits() -> Listing:
    """Return the digits as gray uint8 images, 0 to 255.

    The split is fixed and depends on no seed: in the order of the data set, every fifth image of each class
    is a validation image (355 of 1,797).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    is_val = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        is_val[(labels == label).nonzero().flatten()[_PERIOD - 1 :: _PERIOD]] = True
    return Listing(
        classes=tuple(str(digit) for digit in range(10)),
        train=ListedSplit(pixels[~is_val], labels[~is_val]),
        val=ListedSplit(pixels[is_val], labels[is_val]),
    )


def list_synthetic(argument: str, memory_limit: int) -> Listing:
    """Draw a data set that a network can learn.

    Each class has a smooth random picture; an image is its class's picture with random contrast, brightness
    and noise. The settings (``classes=10,size=32,channels=3,train=512,val=128,seed=0``, any of them may be
    left out) fix every pixel. Classes take turns, so that each split has the same number of each. Images, and
    the pictures that they are drawn from, may take ``memory_limit`` bytes.

    Raises:
        UserError: an unknown setting, a value that is no integer or too small, or images that take more than
            ``memory_limit``.
    """
    settings = _parse(argument)
    pixels = settings["channels"] * settings["size"] ** 2
    needed = (settings["train"] + settings["val"] + 4 * settings["classes"]) * pixels
    if needed > memory_limit:
        raise UserError(
            f"synthetic data of {in_words(needed)} is more than the {in_words(memory_limit)} that it may "
            "take; make size, channels, train, val or classes smaller"
        )
    classes, size, channels = settings["classes"], settings["size"], settings["channels"]
    generator = seeded_generator("synthetic", settings["seed"])
    coarse = torch.randn(classes, channels, 4, 4, generator=generator)
    pictures = F.interpolate(coarse, size=(size, size), mode="bicubic")
    train = _draw(pictures, settings["train"], generator)
    val = _draw(pictures, settings["val"], generator)
    return Listing(tuple(f"class {number}" for number in range(classes)), train, val)


def _draw(pictures: Tensor, count: int, generator: torch.Generator) -> ListedSplit:
    labels = torch.arange(count) % len(pictures)
    images = torch.empty(count, *pictures.shape[1:], dtype=torch.uint8)
    for start in range(0, count, _CHUNK):
        part = labels[start : start + _CHUNK]
        contrast = 0.75 + 0.5 * torch.rand(len(part), 1, 1, 1, generator=generator)
        brightness = 0.3 * torch.randn(len(part), 1, 1, 1, generator=generator)
        noise = 0.8 * torch.randn(len(part), *pictures.shape[1:], generator=generator)
        drawn = pictures[part] * contrast + brightness + noise
        images[start : start + _CHUNK] = (drawn * 40 + 128).round().clamp(0, 255).to(torch.uint8)
    return ListedSplit(images, labels)


def _parse(argument: str) -> dict[str, int]:
    settings = dict(_DEFAULTS)
    for item in filter(None, argument.split(",")):
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in _DEFAULTS:
            raise UserError(f"synthetic data has no setting {shown(name)}; it has {', '.join(_DEFAULTS)}")
        most = _DIGITS if name != "seed" else _SEED_DIGITS
        if not value.isdecimal() or len(value) > most or int(value) < _LEAST[name]:
            raise UserError(
                f"synthetic {name}={shown(value)} is not possible; an integer from {_LEAST[name]} on is, of "
                f"up to {most} digits"
            )
        settings[name] = int(value)
    if settings["train"] < settings["classes"]:
        raise UserError(
            f"synthetic train={settings['train']} is fewer than its {settings['classes']} classes; "
            "each class needs an image"
        )
    return settings
