"""What a method can be attached to: the network itself, and only one method to a network and an optimizer."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from clicktrain.errors import UserError
from clicktrain.kernels.sparse_conv2d import PackedLayer

if TYPE_CHECKING:
    from clicktrain.methods.driver.pruner import Pruner

_CLAIMS: weakref.WeakKeyDictionary[nn.Module | Optimizer, weakref.ref[Pruner]] = weakref.WeakKeyDictionary()


def check_free(things: Iterable[nn.Module | Optimizer]) -> None:
    """UserError if one of these modules or optimizers has a method attached already."""
    for thing in things:
        owner = _owner(thing)
        if owner is not None:
            # A loop that failed leaves its pruner and its optimizers behind, which refer to each other.
            del owner
            gc.collect()
            owner = _owner(thing)
        if owner is not None:
            what = "optimizer" if isinstance(thing, Optimizer) else "network"
            raise UserError(
                f"this {what} ({type(thing).__name__}) has the method {owner.method.name} attached already: "
                "call finish() or close() of that pruner before attaching again"
            )


def _owner(thing: nn.Module | Optimizer) -> Pruner | None:
    claim = _CLAIMS.get(thing)
    return None if claim is None else claim()


def claim(pruner: Pruner, things: Iterable[nn.Module | Optimizer]) -> None:
    """Note that these modules and optimizers are a pruner's."""
    for thing in things:
        _CLAIMS[thing] = weakref.ref(pruner)


def release(pruner: Pruner) -> None:
    """Give up what a pruner has claimed."""
    for thing in [thing for thing, claim in _CLAIMS.items() if claim() is pruner]:
        del _CLAIMS[thing]


def check_network(model: nn.Module) -> None:
    """UserError if this is no network, or a wrapper around it and not the network itself."""
    if not isinstance(model, nn.Module):
        raise UserError(f"attach takes the network, a torch.nn.Module, not a {type(model).__name__}")
    wrapper = isinstance(model, DistributedDataParallel | nn.DataParallel)
    if wrapper or "_orig_mod" in model._modules:
        raise UserError(
            f"attach takes the network itself, not a {type(model).__name__} around it, which would keep "
            "parameters that are replaced: attach first, then call pruner.wrapped(...) to wrap it"
        )
    if isinstance(model, AveragedModel):
        raise UserError(
            "attach takes the network that is trained, not an AveragedModel of it: attach to the network, "
            "then call pruner.follow(average)"
        )


def check_dense(model: nn.Module) -> None:
    """UserError if layers are packed: no method could prune them, and all would say something else of it."""
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLayer)]
    if packed:
        raise UserError(
            f"{packed[0] or 'the network'} is packed already: attach to the network that "
            "clicktrain.unpack(model) gives"
        )
