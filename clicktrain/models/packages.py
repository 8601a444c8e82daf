"""Networks of timm and torchvision by name: ``timm:resnet26``, ``torchvision:resnet18``.

The package is imported where such a name is used. Nothing is ever downloaded: pretrained weights come from
the package's own cache, or from a file.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError, shortened
from clicktrain.own_code import PACKAGES

CHANNELS = 3
"""What torchvision's networks read."""
_WITH_AUXILIARY_HEADS = ("googlenet", "inception_v3")
"""They would give several outputs in training mode, and one in evaluation mode."""


def in_package(name: str) -> bool:
    """Whether a name is ``timm:NAME`` or ``torchvision:NAME``."""
    package, colon, _ = name.partition(":")
    return bool(colon) and package in PACKAGES


def list_package_models(package: str) -> tuple[str, ...]:
    """The image classifiers of a package, with its prefix; UserError if it is not installed."""
    module = _import(package)
    names = module.list_models() if package == "timm" else _torchvision().list_models(_torchvision())
    return tuple(f"{package}:{name}" for name in names)


def create_package_model(
    name: str, *, num_classes: int, in_channels: int = CHANNELS, image_size: int | None = None
) -> nn.Module:
    """Build a network of a package with fresh weights.

    It maps images [N, in_channels, H, W] to logits [N, num_classes]. Where a network is made for one size of
    images (vision transformers), it is made for ``image_size``, in pixels; by default for the package's.

    Raises:
        UserError: the package is not installed or does not have this network, or it cannot be built so.
    """
    package, _, short = name.partition(":")
    options: dict[str, Any] = {"num_classes": num_classes}
    _check_known(package, short)
    if package == "timm":
        options["in_chans"] = in_channels
        if image_size is not None and _timm_config(short).get("fixed_input_size"):
            options["img_size"] = image_size
    else:
        if short in _WITH_AUXILIARY_HEADS:
            options |= {"aux_logits": False, "init_weights": True}
        if image_size is not None and short.startswith("vit_"):
            options["image_size"] = image_size
    try:
        model = _built(package, short, options)
    except Exception as error:  # of a package: whatever it does not like about these sizes
        reason = shortened(str(error).strip().split("\n", 1)[0], 160)
        sizes = ", ".join(f"{key}={value}" for key, value in options.items())
        raise UserError(
            f"{package} cannot build {short} with {sizes}: {type(error).__name__}: {reason}"
        ) from error
    if package == "torchvision" and in_channels != CHANNELS:
        _read_channels_(model, in_channels, name)
    return model


def pretrained_weights(name: str, *, num_classes: int, in_channels: int = CHANNELS) -> dict[str, Tensor]:
    """The published weights of a network that lie in its package's cache, fitted to these numbers.

    timm's rules fit the first layer to other numbers of channels. The classifier is left out, unless it has
    ``num_classes`` classes already.

    Returns:
        Entries of the network's state dict, on the CPU.

    Raises:
        UserError: not of a package, or its weights are not in the cache: the sentence says how to fetch them.
    """
    if not in_package(name):
        raise UserError(
            f"{name} has no pretrained weights: they are for networks of timm and torchvision (timm:resnet26)"
        )
    package, _, short = name.partition(":")
    _check_known(package, short)
    with torch.random.fork_rng(devices=[]):
        model = (_timm_pretrained if package == "timm" else _torchvision_pretrained)(short, in_channels)
    state = dict(model.state_dict())
    if package == "timm" and in_channels != CHANNELS:
        fitted = _built(package, short, {"in_chans": in_channels, "num_classes": num_classes})
    else:
        fitted = create_package_model(name, num_classes=num_classes, in_channels=in_channels)
    own = fitted.state_dict()
    return {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}


def _timm_pretrained(short: str, in_channels: int) -> nn.Module:
    path = _in_timm_cache(short)
    if path is None:
        raise UserError(
            f"the weights of timm's {short} are not in its cache: fetch them where there is a network, by "
            f"python -c \"import timm; timm.create_model('{short}', pretrained=True)\", or name a file"
        )
    options = {"pretrained": True, "in_chans": in_channels, "pretrained_cfg_overlay": {"file": str(path)}}
    return _built("timm", short, options)


def _in_timm_cache(short: str) -> Path | None:
    """Where timm would find the weights without a download: Hugging Face's cache, or that of torch.hub."""
    config = _timm_config(short)
    if config.get("file"):
        return Path(config["file"])
    if config.get("hf_hub_id"):
        hub = importlib.import_module("huggingface_hub")
        names = [config.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin"]
        for file in filter(None, names):
            found = hub.try_to_load_from_cache(config["hf_hub_id"], file)
            if isinstance(found, str):
                return Path(found)
    return _in_hub_cache(config.get("url"))


def _in_hub_cache(url: str | None) -> Path | None:
    path = Path(torch.hub.get_dir()) / "checkpoints" / (url or "").rpartition("/")[2]
    return path if path.is_file() else None


def _torchvision_pretrained(short: str, in_channels: int) -> nn.Module:
    if in_channels != CHANNELS:
        raise UserError(
            f"the weights of torchvision's {short} read images of {CHANNELS} channels, the data has "
            f"{in_channels}: use timm's networks, whose first layer is fitted"
        )
    members = _torchvision().get_model_weights(short)
    default = getattr(members, "DEFAULT", None)
    for weights in (default, *(one for one in members if one is not default)):
        if weights is not None and _in_hub_cache(weights.url) is not None:
            extra = {"aux_logits": False} if short in _WITH_AUXILIARY_HEADS else {}
            return _built("torchvision", short, {"weights": weights, "progress": False, **extra})
    raise UserError(
        f"the weights of torchvision's {short} are not in its cache: fetch them where there is a network, by "
        f"python -c \"import torchvision; torchvision.models.get_model('{short}', weights='DEFAULT')\", or "
        "name a file"
    )


def _import(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"{package} cannot be imported ({shortened(str(error), 120)}): pip install 'clicktrain[models]' "
            "brings it"
        ) from error


def _torchvision() -> Any:
    _import("torchvision")
    return importlib.import_module("torchvision.models")


def _timm_config(short: str) -> Mapping[str, Any]:
    timm: Any = _import("timm")
    config = timm.get_pretrained_cfg(short)
    return {} if config is None else dict(config.to_dict())


def _check_known(package: str, short: str) -> None:
    """UserError unless the package's own list has the network: other names would be looked for elsewhere."""
    names: Sequence[str]
    if package == "timm":
        timm: Any = _import("timm")
        known = timm.is_model(short) and ":" not in short and "/" not in short
        names = () if known else timm.list_models()
    else:
        names = _torchvision().list_models(_torchvision())
        known = short in names
    if not known:
        near = difflib.get_close_matches(short, names, n=3, cutoff=0.6)
        hint = f" (did you mean {' or '.join(f'{package}:{one}' for one in near)}?)" if near else ""
        raise UserError(
            f"{package} has no network {shortened(short, 80)!r}{hint}: clicktrain models '{package}:*' lists "
            "them"
        )


def _built(package: str, short: str, options: Mapping[str, Any]) -> nn.Module:
    timm: Any = _import("timm") if package == "timm" else None
    create = _torchvision().get_model if timm is None else timm.create_model
    model: nn.Module = create(short, **options)
    return model


def _read_channels_(model: nn.Module, channels: int, name: str) -> None:
    """Exchange the first convolution of a network for one that reads other images."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == CHANNELS:
            first = nn.Conv2d(
                channels, module.out_channels, module.kernel_size, module.stride, module.padding,  # type: ignore[arg-type]
                module.dilation, bias=module.bias is not None,  # type: ignore[arg-type]
            )  # fmt: skip
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, first)
            return
    raise UserError(f"{name} has no convolution that reads images of {CHANNELS} channels: use such images")
