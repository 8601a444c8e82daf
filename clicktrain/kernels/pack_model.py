"""Packing a model and its optimizers: from then on weights, gradients and moments are packed values.

Only the modules, the parameters and what an optimizer keeps per weight are exchanged; the optimizer object
with its hooks, its groups and their order stays.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clicktrain.errors import UserError
from clicktrain.formats.packed import Patterns, Structure, pack_values, unpack_values
from clicktrain.graph.exchange import exchange_, replace_module_, state_refusal
from clicktrain.kernels.sparse_conv2d.packed_layer import PackedLayer, mask_refusal, packed_form, refusal

__all__ = [
    "dense_state_dict",
    "index_names",
    "pack",
    "pack_model_",
    "pack_refusals",
    "unpack",
    "unpack_model_",
]

M = TypeVar("M", bound=nn.Module)
_HINT = "make the optimizer after packing, or train with packed=False"
_Convert: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def index_names(model: nn.Module) -> list[str]:
    """Name the buffers that hold the kept positions of packed layers: what follows from masks."""
    layers = ((name, one) for name, one in model.named_modules() if isinstance(one, PackedLayer))
    return [f"{name}.keep_bits" if name else "keep_bits" for name, _ in layers]


def pack_refusals(
    model: nn.Module, names: Iterable[str], optimizers: Sequence[Optimizer] = ()
) -> dict[str, str]:
    """Name the layers that cannot be packed, or whose optimizer state cannot: layer name -> reason."""
    modules = dict(model.named_modules(remove_duplicate=False))
    uses = _Uses(model)
    refusals: dict[str, str] = {}
    for name in names:
        module = modules.get(name)
        if module is None:
            refusals[name] = "there is no such layer"
        elif isinstance(module, PackedLayer):
            continue
        elif (reason := refusal(module)) is not None:
            refusals[name] = reason
        elif name == "":
            refusals[name] = "it is the model itself and has no parent to hang the packed layer into"
        else:
            weight = _weight(module)
            reason = uses.shared(module, weight) or state_refusal(weight, optimizers, _HINT, factors=False)
            if reason is not None:
                refusals[name] = reason
    return refusals


def pack_model_(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    optimizers: Sequence[Optimizer] = (),
    patterns: Mapping[str, Patterns] = MappingProxyType({}),
) -> None:
    """Exchange layers for packed ones, in the model and in its optimizers.

    What is outside a mask (layer name -> bool of the weight's shape, True = kept) is dropped: weights,
    gradients and optimizer state. Whatever state an optimizer keeps in the weight's shape is packed, scalars
    stay. Layers that are packed already, at the same positions, stay. A wrapper that holds on to parameters
    (DistributedDataParallel) has to be rebuilt. ``patterns``, of layers whose positions will move: see
    `Structure.from_mask`.

    Raises:
        UserError: a layer cannot be packed; names it, and nothing has been changed.
    """
    refusals = pack_refusals(model, masks, optimizers)
    modules = {name: model.get_submodule(name) for name in masks if name not in refusals}
    for name, module in modules.items():
        reason = None
        if not isinstance(module, PackedLayer):
            reason = mask_refusal(module, masks[name])
        elif not _same_positions(module, masks[name]):
            reason = "it is packed already, with other positions: unpack it first"
        if reason is not None:
            refusals[name] = reason
    _raise(refusals, "packed")
    for name, module in modules.items():
        if not isinstance(module, PackedLayer):
            weight, packed = _weight(module), _packed(module, masks[name], name, patterns.get(name))
            replace_module_(model, name, packed)
            exchange_(optimizers, {weight: packed.values}, _converter(packed, pack_values))


def unpack_model_(model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> None:
    """Inverse of `pack_model_`; a UserError, with nothing changed, if an optimizer state has no such form."""
    if isinstance(model, PackedLayer):
        raise UserError("the model itself is a packed layer: use unpack(model), which returns a new one")
    modules = {name: m for name, m in model.named_modules() if isinstance(m, PackedLayer)}
    uses = _Uses(model)
    reasons = {
        name: uses.shared(module, module.values)
        or state_refusal(module.values, optimizers, _HINT, factors=False)
        for name, module in modules.items()
    }
    _raise({name: reason for name, reason in reasons.items() if reason is not None}, "unpacked")
    for name, module in modules.items():
        layer = module.to_dense()
        replace_module_(model, name, layer)
        exchange_(optimizers, {module.values: _weight(layer)}, _converter(module, unpack_values))


def settle_model_(model: nn.Module, optimizers: Sequence[Optimizer] = ()) -> bool:
    """Give packed layers whose positions moved the form that final ones have; whether there were any."""
    moving = [m for m in model.modules() if isinstance(m, PackedLayer) and m.structure.patterns is not None]
    for layer in moving:
        layer.move_(Structure.from_mask(layer.structure.mask()), optimizers)
    return bool(moving)


def pack(model: M) -> M:
    """A copy of a pruned model with packed layers; what is exactly zero counts as pruned.

    Layers that would not get smaller (some weights of any network are zero by chance), and those that cannot
    be packed, stay as they are. The copy is a `PackedLayer` if the model itself is a layer.
    """
    result = copy.deepcopy(model)
    masks = {
        name: (_weight(module).detach() != 0)
        for name, module in result.named_modules()
        if refusal(module) is None
    }
    sparse = {name: mask for name, mask in masks.items() if _pays(mask, result.get_submodule(name))}
    if "" in sparse:
        return _packed(result, sparse[""])  # type: ignore[return-value]
    refused = pack_refusals(result, sparse)
    pack_model_(result, {name: mask for name, mask in sparse.items() if name not in refused})
    return result


def unpack(model: M) -> M:
    """A copy of a model whose packed layers are plain ones again, with zeros in place."""
    result = copy.deepcopy(model)
    if isinstance(result, PackedLayer):
        return result.to_dense()  # type: ignore[return-value]
    unpack_model_(result)
    return result


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` that the model would have unpacked: same keys, order and shapes, zeros in place."""
    layers = {
        f"{name}." if name else "": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, PackedLayer)
    }
    dense: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        stem, _, leaf = key.rpartition(".")
        layer = layers.get(f"{stem}." if stem else "")
        if layer is None or leaf not in ("values", "keep_bits"):
            dense[key] = value
        elif leaf == "values":
            dense[f"{stem}.weight" if stem else "weight"] = unpack_values(layer.structure, value)
    return dense


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _packed(
    module: nn.Module, mask: Tensor, name: str = "the layer", patterns: Patterns | None = None
) -> PackedLayer:
    form = packed_form(module)
    assert form is not None
    return form.from_dense(module, mask, name, patterns)


def _converter(layer: PackedLayer, function: Callable[[Structure, Tensor], Tensor]) -> _Convert:
    """One layer's conversion of per-weight tensors, between packed and dense."""

    def convert(_: Tensor, tensor: Tensor) -> Tensor:
        structure = layer.structure.to(tensor.device)  # an optimizer may keep its state elsewhere
        return function(structure, tensor.detach())

    return convert


class _Uses:
    def __init__(self, model: nn.Module) -> None:
        self.parameters: dict[int, list[str]] = {}
        self.modules: dict[int, list[str]] = {}
        for name, module in model.named_modules():
            prefix = f"{name}." if name else ""
            for key, parameter in module._parameters.items():
                self.parameters.setdefault(id(parameter), []).append(f"{prefix}{key}")
            for key, child in module._modules.items():
                self.modules.setdefault(id(child), []).append(f"{prefix}{key}")

    def shared(self, module: nn.Module, parameter: Tensor) -> str | None:
        """Why a layer and its weight are not at one place only; None if they are."""
        names = self.parameters[id(parameter)]
        if len(names) > 1:
            return f"its weight is shared by {' and '.join(names)}"
        places = self.modules.get(id(module), [])
        return f"it is the same module as {' and '.join(places)}" if len(places) > 1 else None


def _pays(mask: Tensor, layer: nn.Module) -> bool:
    """Whether values and one bit a weight are smaller than all weights."""
    return (mask.numel() - int(mask.sum())) * _weight(layer).element_size() * 8 > mask.numel()


def _same_positions(layer: PackedLayer, mask: Tensor) -> bool:
    if mask.dtype != torch.bool or tuple(mask.shape) != layer.structure.shape:
        return False
    return torch.equal(layer.structure.mask(), mask.to(layer.structure.device))


def _raise(refusals: Mapping[str, str], what: str) -> None:
    if refusals:
        listed = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in refusals.items())
        raise UserError(f"these layers cannot be {what}: {listed}")
