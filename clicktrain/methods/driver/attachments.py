"""What a method can be attached to: one unwrapped network, and optimizers without another method."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from clicktrain.errors import UserError
from clicktrain.kernels.sparse_conv2d import PackedLayer

_CLAIMS: weakref.WeakKeyDictionary[nn.Module | Optimizer, weakref.ref[Claim]] = weakref.WeakKeyDictionary()


class Claim:
    """A method's claim on modules and optimizers; it ends with the pruner that holds it, or by `release`."""

    def __init__(self, method: str, things: Iterable[nn.Module | Optimizer]) -> None:
        self.method = method
        for thing in things:
            _CLAIMS[thing] = weakref.ref(self)

    def release(self) -> None:
        """Give the modules and optimizers free."""
        for thing in [thing for thing, claim in _CLAIMS.items() if claim() is self]:
            del _CLAIMS[thing]


def check_free(things: Iterable[nn.Module | Optimizer]) -> None:
    """Raise a UserError if one of these modules or optimizers has a method attached already."""
    for thing in things:
        if _claim_on(thing) is not None:
            gc.collect()  # a loop that failed leaves its pruner and its optimizers behind, in a cycle
        claim = _claim_on(thing)
        if claim is not None:
            what = "optimizer" if isinstance(thing, Optimizer) else "network"
            raise UserError(
                f"this {what} ({type(thing).__name__}) has the method {claim.method} attached already: "
                "call finish() or close() of that pruner before attaching again"
            )


def _claim_on(thing: nn.Module | Optimizer) -> Claim | None:
    claim = _CLAIMS.get(thing)
    return None if claim is None else claim()


def check_network(model: nn.Module) -> None:
    """Raise a UserError for anything but a network, and for a wrapper around one."""
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
    """Raise a UserError if layers are packed: no method can prune them."""
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLayer)]
    if packed:
        raise UserError(
            f"{packed[0] or 'the network'} is packed already: attach to the network that "
            "clicktrain.unpack(model) gives"
        )
