"""The random changes to training images that the settings of a run ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clicktrain.data import Augment, ImageData, Policy, RandAugment, TrivialAugment
from clicktrain.train.config import RunConfig
from clicktrain.train.setting_checks import randaugment_settings

SMALL_IMAGE = 64
"""Images up to this side in pixels get the CIFAR stem and recipe."""


def augmentation(config: RunConfig, data: ImageData) -> Augment:
    """Random changes to training images, as the settings say; ``auto`` goes by the data set."""
    preset = augment_preset(config, data.spec, data.image_shape)
    policy: Policy | None = None
    if config.auto_augment == "randaugment":
        policy = RandAugment(**randaugment_settings(config))
    elif config.auto_augment == "trivialaugment":
        policy = TrivialAugment()
    return replace(
        Augment.preset(preset),
        cutout=config.cutout,
        policy=policy,
        erasing=config.erasing,
        erasing_fill=config.erasing_fill,
    )


def augment_preset(config: RunConfig, spec: str, image_shape: Sequence[int]) -> str:
    """The name of the augmentation, ``auto`` resolved for data of this specification and [C, H, W]."""
    if config.augment != "auto":
        return config.augment
    by_size = "cifar" if max(image_shape[1:]) <= SMALL_IMAGE else "imagenet"
    return {"digits": "digits", "synthetic": "none"}.get(spec.partition(":")[0], by_size)
