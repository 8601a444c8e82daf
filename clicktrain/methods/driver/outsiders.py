"""Parameters that no attached optimizer holds; if another one trains them, they must not lose channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from clicktrain.errors import UserError
from clicktrain.methods.driver.optimizers import AttachedOptimizers
from clicktrain.surgery import SurgeryPlan

_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase)
"""Layers whose parameters have channels."""


@dataclass(eq=False)
class _Outsider:
    """A trainable parameter that no attached optimizer holds."""

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
        """Whether an attached optimizer holds it by now."""
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
