"""Saving the network of a loop of one's own: kept weights, and what makes a fresh network fit them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from clicktrain.deploy.plain import itself
from clicktrain.errors import UserError
from clicktrain.formats.packed_file import save_packed
from clicktrain.kernels.pack_model import dense_state_dict
from clicktrain.kernels.sparse_conv2d import PackedLayer
from clicktrain.models.origin import origin_of
from clicktrain.runs.folder import RunFolder
from clicktrain.surgery import SAVED, plans_of

VERSION = 1


def save(model: nn.Module, folder: str | PathLike[str], *, image_shape: Sequence[int] | None = None) -> Path:
    """Save a network, pruned or not, as one small file ``packed.safetensors`` in a folder, which is made.

    The file has the kept weights and one bit for each position of layers with zeros, all others as they are,
    and the removals of channels and layers that were carried out on this network: it knows them itself.
    Packed layers and views of `accelerate` are taken for the network that they are of.

    `clicktrain.load` reads it: a network of `create_model` by the folder alone, one of your own by its class.

    Args:
        folder: an earlier file of this function there is replaced.
        image_shape: [C, H, W], for ``clicktrain.load(folder, batch=64)``.

    Returns:
        The file.

    Raises:
        UserError: a wrapper is given instead of the network, the folder holds a run, or cannot be written to.

    Example:
        ``clicktrain.save(model, "saved"); model = clicktrain.load("saved", model=MyNetwork)``
    """
    model, target = itself(model, "clicktrain.save"), RunFolder(Path(folder))
    if target.config.exists():
        raise UserError(f"{target.path} is the folder of a run: give another one")
    inside = [name for name, module in model.named_modules() if name and plans_of(module)]
    if inside:
        raise UserError(
            f"channels were removed from a part of the network, {inside[0]}: save that part, which knows them"
        )
    if image_shape is not None and (len(image_shape) != 3 or min(image_shape) < 1):
        raise UserError(f"image_shape is {list(image_shape)}: give channels, height and width")
    name, arguments = origin_of(model)
    description = {
        "version": VERSION,
        "model": name,
        "arguments": arguments,
        "image_shape": None if image_shape is None else [int(size) for size in image_shape],
        "plans": [plan.to_json() for plan in plans_of(model)],
    }
    weights = {key: value.detach().cpu().contiguous() for key, value in dense_state_dict(model).items()}
    try:
        target.path.mkdir(parents=True, exist_ok=True)
        save_packed(target.packed, weights, _masks(model, weights), {SAVED: json.dumps(description)})
    except OSError as error:
        raise UserError(f"cannot write to {target.path}: {error.strerror}") from None
    return target.packed


def _masks(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kept positions: of packed layers theirs, else what is not zero, where that makes the file smaller."""
    masks = {
        f"{name}.weight": layer.structure.mask().cpu()
        for name, layer in model.named_modules()
        if isinstance(layer, PackedLayer)
    }
    for name, weight in weights.items():
        if name in masks or weight.dim() < 2 or not weight.is_floating_point():
            continue
        kept = weight != 0
        if (kept.numel() - int(torch.count_nonzero(kept))) * weight.element_size() * 8 > kept.numel():
            masks[name] = kept
    return masks
