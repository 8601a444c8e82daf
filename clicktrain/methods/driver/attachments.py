"""What a method can be attached to: one unwrapped network, and optimizers without another method."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from clicktrain.errors import UserError
from clicktrain.kernels.sparse_conv2d import PackedLayer
from clicktrain.methods.driver.optimizers import AttachedOptimizers
from clicktrain.methods.driver.several import check_not_sharded, is_data_parallel
from clicktrain.surgery import SurgeryPlan

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
    check_not_sharded(model)
    if is_data_parallel(model) or "_orig_mod" in model._modules:
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


_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase)
"""Layers whose parameters have channels."""


@dataclass(eq=False)
class _Outsider:
    name: str
    parameter: Tensor
    version: int
    norm: Tensor
    """At the last change of version; optimizers that write through ``.data`` do not change the version."""
    layered: bool
    """It belongs to a layer with channels."""
    moved: int = 0
    """Batches at which it had changed."""


class Outsiders:
    """The trainable parameters of a network that no attached optimizer holds."""

    def __init__(self, model: nn.Module, optimizers: AttachedOptimizers, replaces: bool) -> None:
        """Start watching; nothing is watched unless the method removes channels (``replaces``)."""
        self._model, self._optimizers, self._replaces = model, optimizers, replaces
        self._outsiders: list[_Outsider] = []

    def look_again(self) -> None:
        """Look for outsiders again: parameters were replaced, or weights may have been loaded."""
        before = {o.name: o.moved for o in self._outsiders}
        held = {id(p) for p in self._optimizers.parameters()}
        self._outsiders = [
            _Outsider(
                f"{name}.{leaf}" if name else leaf,
                p,
                p._version,
                _norm(p),
                isinstance(module, _WEIGHTED),
                before.get(f"{name}.{leaf}", 0),
            )
            for name, module in self._model.named_modules()
            for leaf, p in module._parameters.items()
            if p is not None and p.requires_grad and id(p) not in held and not is_lazy(p)
        ] if self._replaces else []  # fmt: skip

    def check_orphans(self, plan: SurgeryPlan) -> None:
        """Raise a UserError that names a parameter which the plan would take from an unknown optimizer."""
        for outsider in self._outsiders:
            replaced = plan.cuts_of(outsider.name) or plan.new_name(outsider.name) is None
            if replaced and self._is_trained(outsider):
                raise self._orphaned(outsider)

    def watch(self) -> None:
        """Raise a UserError as soon as a parameter that could lose channels is seen to be trained."""
        for outsider in self._outsiders:
            version = outsider.parameter._version
            if version != outsider.version:
                outsider.version, outsider.norm = version, _norm(outsider.parameter)
                outsider.moved += 1
                if outsider.layered and outsider.moved >= 3 and not self._now_held(outsider):
                    raise self._orphaned(outsider)

    def _is_trained(self, outsider: _Outsider) -> bool:
        if self._now_held(outsider):
            return False
        return outsider.moved >= 2 or not torch.equal(_norm(outsider.parameter), outsider.norm)

    def _now_held(self, outsider: _Outsider) -> bool:
        return any(p is outsider.parameter for p in self._optimizers.parameters())

    def _orphaned(self, outsider: _Outsider) -> UserError:
        return UserError(
            f"{outsider.name} is trained by an optimizer that attach was not given, and would be lost to it "
            "when channels are removed: give attach all optimizers, attach(model, [first, second], ...)"
        )


@torch.no_grad()
def _norm(parameter: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(parameter.detach().float())
    return norm
