"""Which networks and optimizers have a method attached: two at a time would undo each other's zeros."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from clicktrain.errors import UserError

if TYPE_CHECKING:
    from clicktrain.methods.pruner import Pruner

_CLAIMS: weakref.WeakKeyDictionary[nn.Module | Optimizer, weakref.ref[Pruner]] = weakref.WeakKeyDictionary()


def check_free(things: Iterable[nn.Module | Optimizer]) -> None:
    """UserError if one of these modules or optimizers has a method attached already."""
    for thing in things:
        claim = _CLAIMS.get(thing)
        owner = None if claim is None else claim()
        if owner is not None:
            what = "optimizer" if isinstance(thing, Optimizer) else "network"
            raise UserError(
                f"this {what} ({type(thing).__name__}) has the method {owner.method.name} attached already: "
                "call finish() or close() of that pruner before attaching again"
            )


def claim(pruner: Pruner, things: Iterable[nn.Module | Optimizer]) -> None:
    """Note that these modules and optimizers are a pruner's."""
    for thing in things:
        _CLAIMS[thing] = weakref.ref(pruner)


def release(pruner: Pruner) -> None:
    """Give up what a pruner has claimed."""
    for thing in [thing for thing, claim in _CLAIMS.items() if claim() is pruner]:
        del _CLAIMS[thing]
