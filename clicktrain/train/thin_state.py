"""Checkpoints without the zeros: kept weights, their optimizer state, and each mask once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clicktrain.kernels.sparse_conv2d import PackedLayer

Masks: TypeAlias = Mapping[str, Tensor]
"""Layer name -> bool, of the weight's shape, True = kept."""

_MASKED_BY = "masked_by"
"""Key of a tensor's replacement: ``{"masked_by": layer name, "values": elements inside the mask}``."""
_BITS = "keep_bits"
"""Entry of a packed layer's ``state_dict`` that repeats the layer's mask."""
_AVERAGE = "module."
"""Prefix of the network's entries in the state of a moving average."""


def thin_weights(model: nn.Module, masks: Masks) -> dict[str, Any]:
    """The ``state_dict`` of a network, without zeros outside masks and without the index of packed layers.

    Args:
        model: the network, or a moving average of it.
        masks: frozen masks of the network; empty before the hard prune.
    """
    repeated = set(_bits_names(model))
    state = {name: value for name, value in model.state_dict().items() if name not in repeated}
    return {name: _thin(value, _layer_of(name), masks) for name, value in state.items()}


def full_weights(model: nn.Module, saved: Mapping[str, Any], masks: Masks) -> dict[str, Tensor]:
    """Inverse of `thin_weights`, for a model that is packed as it was when it was saved."""
    own = model.state_dict()
    positions = {name: own[name] for name in _bits_names(model)}
    return {name: _full(value, masks) for name, value in saved.items()} | positions


def thin_optimizer(optimizer: Optimizer, model: nn.Module, masks: Masks) -> dict[str, Any]:
    """The ``state_dict`` of an optimizer, without the zeros of pruned weights."""
    state: dict[str, Any] = optimizer.state_dict()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    layers = [_layer_of(names.get(id(parameter), "")) for parameter in parameters]
    held = {
        number: {key: _thin(value, layers[number], masks) for key, value in entries.items()}
        for number, entries in state["state"].items()
    }
    return {**state, "state": held}


def full_optimizer(saved: Mapping[str, Any], masks: Masks) -> dict[str, Any]:
    """Inverse of `thin_optimizer`."""
    held = {
        number: {key: _full(value, masks) for key, value in entries.items()}
        for number, entries in saved["state"].items()
    }
    return {**saved, "state": held}


def _thin(value: Any, layer: str | None, masks: Masks) -> Any:
    """A tensor's elements inside its layer's mask, if all others are zero; else the value as it is."""
    mask = masks.get(layer) if layer is not None else None
    if mask is None or not isinstance(value, Tensor) or value.shape != mask.shape or not len(mask):
        return value
    mask = mask.to(value.device)
    if bool((value.detach() != 0).logical_and_(~mask).any()):
        return value
    return {_MASKED_BY: layer, "values": value.detach()[mask]}


def _full(value: Any, masks: Masks) -> Any:
    if not (isinstance(value, dict) and value.keys() == {_MASKED_BY, "values"}):
        return value
    mask, values = masks[value[_MASKED_BY]], value["values"]
    full = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    full[mask.to(values.device)] = values
    return full


def _layer_of(name: str) -> str | None:
    """The layer whose weight an entry is, in the network or in an average of it."""
    stem, _, leaf = name.removeprefix(_AVERAGE).rpartition(".")
    return stem if leaf == "weight" else None


def _bits_names(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedLayer):
            yield f"{name}.{_BITS}" if name else _BITS
