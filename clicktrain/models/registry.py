"""Networks by name: the zoo, those of timm and torchvision, and a user's own."""

from __future__ import annotations

import difflib
import math
from typing import Any

import torch
from torch import nn

from clicktrain.errors import UserError, shortened
from clicktrain.limits import check_memory
from clicktrain.models.cifarnet import MIN_IMAGE, CifarNet
from clicktrain.models.layers import Stem
from clicktrain.models.mobilenet import MobileNetV1
from clicktrain.models.mobilenet_v3 import MOBILENETS_V3, mobilenet_v3
from clicktrain.models.origin import note_origin_
from clicktrain.models.packages import create_package_model, in_package
from clicktrain.models.resnet import RESNETS, resnet
from clicktrain.models.user_factory import HOW_TO_NAME, create_user_model
from clicktrain.models.vgg import VGGS, vgg
from clicktrain.own_code import is_own

MOBILENET = "mobilenet_v1"
CIFARNET = "cifarnet"
_BYTES_PER_PARAMETER = 12  # float32 weight, gradient and momentum
_FEATURES, _FIRST_FILTERS = 512, 400
"""What a network of a package has about, in parameters: per class, and per channel of the images."""
STEMS: tuple[Stem, ...] = ("imagenet", "cifar")


def list_models() -> tuple[str, ...]:
    """Names of the zoo, family by family."""
    return (*RESNETS, *VGGS, MOBILENET, *MOBILENETS_V3, CIFARNET)


def create_model(
    name: str,
    *,
    num_classes: int,
    in_channels: int = 3,
    width: float = 1.0,
    stem: str | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """Build a network with random weights, from PyTorch's default random generator.

    It maps images [N, in_channels, H, W] to logits [N, num_classes].

    Args:
        name: one of ``list_models()``; ``timm:NAME`` or ``torchvision:NAME`` for a network of these packages;
            or ``package.module:factory`` for a network of the user's own, which is imported, see
            ``create_user_model``. ``stem`` is for the first kind alone.
        num_classes: at least 1.
        in_channels: at least 1.
        width: factor on all channels, see ``scaled_channels``.
        stem: ``imagenet`` or ``cifar`` (for images up to 64 pixels); None = the one the network was
            published with: ``cifar`` for the CIFAR residual networks, else ``imagenet``.
        image_size: side of the images in pixels, for networks of packages that are made for one size.

    Raises:
        UserError: unknown name, a package that is not installed, value out of range, a network that does not
            fit the machine's memory, or a factory that is not usable or raises.

    Examples:
        >>> model = create_model("resnet20", num_classes=10)
        >>> sum(p.numel() for p in model.parameters())
        272474
    """
    check_numbers(num_classes, in_channels, width)
    known_stem = check_stem(stem)
    sizes: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
    if is_own(name):
        model = create_user_model(name, **sizes)
    elif in_package(name):
        model = _checked_from_package(name, sizes, image_size)
    else:
        model = _checked_from_zoo(name, sizes, known_stem)
    note_origin_(model, name, {**sizes, "stem": stem})
    return model


def _checked_from_package(name: str, sizes: dict[str, Any], image_size: int | None) -> nn.Module:
    num_classes, in_channels = sizes["num_classes"], sizes["in_channels"]
    if sizes["width"] != 1:
        raise UserError(f"{name} has no width: width must stay 1.0")
    check_memory(
        _BYTES_PER_PARAMETER * (_FEATURES * num_classes + _FIRST_FILTERS * in_channels),
        f"training model {name} of {num_classes} classes and {in_channels} channels",
        "make it smaller",
    )
    return create_package_model(name, num_classes=num_classes, in_channels=in_channels, image_size=image_size)


def _checked_from_zoo(name: str, sizes: dict[str, Any], stem: Stem | None) -> nn.Module:
    num_classes, in_channels, width = sizes["num_classes"], sizes["in_channels"], sizes["width"]
    small = num_classes <= 20_000 and in_channels <= 64 and width <= 2  # a few GB at most
    if name in list_models() and not small:
        _check_size(name, sizes, stem)
    return _from_zoo(name, sizes, stem)


def _check_size(name: str, sizes: dict[str, Any], stem: Stem | None) -> None:
    """Raise UserError for a network whose weights and training state do not fit the machine's memory."""
    try:
        with torch.device("meta"):  # shapes alone, no memory
            model = _from_zoo(name, sizes, stem)
        parameters = float(sum(parameter.numel() for parameter in model.parameters()))
    except (RuntimeError, TypeError, OverflowError, ValueError):  # shapes beyond 64-bit numbers
        parameters = math.inf
    size = "{num_classes} classes, {in_channels} channels and width {width:g}".format(**sizes)
    if not math.isfinite(parameters):
        raise UserError(f"model {name} of {size} has more weights than can be numbered: make it smaller")
    check_memory(
        _BYTES_PER_PARAMETER * parameters,
        f"training model {name} of {size} ({parameters:.3g} parameters)",
        "make it smaller",
    )


def _from_zoo(name: str, sizes: dict[str, Any], stem: Stem | None) -> nn.Module:
    if name in RESNETS:
        return resnet(name, **sizes, stem=stem)
    if name in VGGS:
        return vgg(name, **sizes, stem=stem)
    if name == MOBILENET:
        return MobileNetV1(**sizes, stem=stem or "imagenet")
    if name in MOBILENETS_V3:
        return mobilenet_v3(name, **sizes, stem=stem or "imagenet")
    if name == CIFARNET:
        return CifarNet(**sizes, stem=stem)
    raise UserError(unknown_model(name))


def min_image_size(name: str, stem: str | None = None) -> int:
    """Smallest height and width in pixels that the network of that name accepts.

    Only the ImageNet form of a VGG and cifarnet have a limit, from their poolings. A network of a package or
    a user's own, about which nothing is known, gets 1.
    """
    if name == CIFARNET:
        return MIN_IMAGE
    return 32 if name in VGGS and stem != "cifar" else 1


def check_numbers(num_classes: int, in_channels: int, width: float) -> None:
    """Raise UserError for the first argument that is out of range."""
    if num_classes < 1:
        raise UserError(f"num_classes must be at least 1, got {num_classes}")
    if in_channels < 1:
        raise UserError(f"in_channels must be at least 1, got {in_channels}")
    if not (math.isfinite(width) and width > 0):
        raise UserError(f"width must be a positive number such as 0.5, got {width}")


def check_stem(stem: str | None) -> Stem | None:
    """The stem, checked; UserError for an unknown one."""
    if stem is None or stem in STEMS:
        return stem
    raise UserError(f"stem must be {' or '.join(STEMS)}, got {stem!r}")


def unknown_model(name: str) -> str:
    """The message for a name that is not in the zoo, with near names and all names."""
    name = shortened(name, 80)
    near = difflib.get_close_matches(name.lower(), list_models(), n=3, cutoff=0.6)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    return (
        f"unknown model {name!r}{hint}: the zoo has {', '.join(list_models())}; timm:NAME and "
        f"torchvision:NAME are networks of these packages; {HOW_TO_NAME}"
    )
