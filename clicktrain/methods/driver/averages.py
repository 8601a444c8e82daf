"""Moving averages of a network: copies that are masked, shrunk and packed with it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from clicktrain.errors import UserError
from clicktrain.formats.packed import Patterns
from clicktrain.kernels.pack_model import pack_model_
from clicktrain.kernels.sparse_conv2d import PackedLayer
from clicktrain.surgery import SurgeryPlan, apply_surgery_

_NOTE = "_clicktrain_copies"


class CopyNote:
    """An attribute of a network while a method is attached; notes the deep copies made of the network.

    Copies and pickles of the network have None in its place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._copies: list[weakref.ref[nn.Module]] = []
        setattr(model, _NOTE, self)

    def averages(self, known: Sequence[nn.Module]) -> list[nn.Module]:
        """The copies inside an ``AveragedModel`` that are not known yet."""
        ids = {id(module) for module in known}
        copies = [c for reference in self._copies if (c := reference()) is not None and id(c) not in ids]
        if not copies:  # looking through all objects takes a while
            return []
        averages = (thing for thing in gc.get_objects() if issubclass(type(thing), AveragedModel))
        held = {id(module) for average in averages for module in average.modules()}
        return [copy for copy in copies if id(copy) in held]

    def remove(self) -> None:
        """Remove the attribute from the network."""
        model = self._model()
        if model is not None and model.__dict__.get(_NOTE) is self:
            delattr(model, _NOTE)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        copy = memo.get(id(self._model()))
        if isinstance(copy, nn.Module):
            self._copies.append(weakref.ref(copy))

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def unwrapped_average(average: object, model: nn.Module) -> nn.Module:
    """Unwrap the copy of the network in an average; UserError if it is none, or the network itself."""
    module = average
    while isinstance(module, nn.Module) and type(module) is not type(model) and "module" in module._modules:
        module = module._modules["module"]
    if not isinstance(module, nn.Module) or type(module) is not type(model):
        raise UserError(
            "follow takes a moving average that is a copy of the network (an AveragedModel of torch.optim, "
            f"or a deep copy of the {type(model).__name__}), not a {type(average).__name__}"
        )
    if module is model:
        raise UserError("follow takes a moving average of the network, not the network itself")
    return module


@torch.no_grad()
def catch_up_(
    copy: nn.Module, model: nn.Module, plans: Sequence[SurgeryPlan], masks: Mapping[str, Tensor]
) -> None:
    """Do to a copy what has been done to the network since it was copied.

    A copy of another network is a UserError, and stays as it is.

    Args:
        copy: of the network, as it was at some time of the run.
        model: the network as it is now.
        plans: the channels that were removed from it, in order.
        masks: its frozen masks, by its present layer names; before they are frozen, those of packed layers.
    """
    start = next((n for n in range(len(plans) + 1) if _leads_to(copy, plans[n:], model)), None)
    if start is None:
        raise UserError(
            "this moving average is not a copy of the network that is attached: make it from that network, "
            "AveragedModel(model), and call pruner.follow(average) at once"
        )
    for plan in plans[start:]:
        apply_surgery_(plan, copy)
    mask_copy_(copy, masks)
    dense: dict[str, Tensor] = {}
    patterns: dict[str, Patterns] = {}
    for name, mask in masks.items():
        own, twin = model.get_submodule(name), copy.get_submodule(name)
        if not isinstance(own, PackedLayer):
            continue
        if isinstance(twin, PackedLayer):
            twin.move_(own.structure.to(twin.structure.device))
            continue
        dense[name] = mask
        if own.structure.patterns is not None:
            patterns[name] = own.structure.patterns
    pack_model_(copy, dense, patterns=patterns)


@torch.no_grad()
def mask_copy_(copy: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Write the zeros of frozen masks into a copy of the network; packed layers have none."""
    for name, mask in masks.items():
        module = copy.get_submodule(name)
        if not isinstance(module, PackedLayer):
            weight = module.weight
            assert isinstance(weight, Tensor)
            weight.masked_fill_(~mask.to(weight.device), 0.0)


def _dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by name; those of packed layers as they were dense."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            if isinstance(module, PackedLayer) and leaf == "values":
                shapes[f"{prefix}weight"] = tuple(module.structure.shape)
            else:
                shapes[f"{prefix}{leaf}"] = tuple(parameter.shape)
    return shapes


def _leads_to(average: nn.Module, plans: Sequence[SurgeryPlan], model: nn.Module) -> bool:
    """Whether these plans turn a copy into the network's present sizes."""
    tried = deepcopy(average) if plans else average
    try:
        for plan in plans:
            apply_surgery_(plan, tried)
    except UserError:  # it was made for other sizes
        return False
    return _dense_shapes(tried) == _dense_shapes(model)
