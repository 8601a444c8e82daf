"""Wrappers that hold on to a network's parameters, made anew whenever the network has other ones.

DistributedDataParallel puts gradients of fixed sizes into buckets; `torch.compile` and CUDA graphs are made
for fixed shapes. When channels have gone (PruneTrain 4.2: reconfiguration in the middle of training)
or convolutions have been packed, all of these are out of date. Whatever else the process has compiled is then
compiled again when it is called.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn

from clicktrain.methods.driver.publisher import ParametersReplaced

if TYPE_CHECKING:
    from clicktrain.methods.driver.pruner import Pruner

W = TypeVar("W", bound=Callable[..., Any])


class Wrapped(Generic[W]):
    """What a loop calls instead of the network; made by `Pruner.wrapped`."""

    def __init__(self, pruner: Pruner, wrap: Callable[[nn.Module], W]) -> None:
        self._pruner, self._wrap = pruner, wrap
        self._current: W | None = None
        self._outdated = False
        itself = weakref.ref(self)

        def note(replaced: ParametersReplaced) -> None:
            if (wrapped := itself()) is not None:
                wrapped._outdated = True

        handle = pruner.subscribe(note, ParametersReplaced)
        weakref.finalize(self, handle.remove)

    @property
    def current(self) -> W:
        """The wrapper around the network as it is: for ``no_sync()`` and the like."""
        if self._current is None or self._outdated:
            if self._current is not None:
                self._current = None  # first: two of them must not hold on to the same parameters
                torch.compiler.reset()  # which keeps few versions of one function, and then uses none
            self._current = self._wrap(self._pruner.model)
            self._outdated = False
        return self._current

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network."""
        return self.current(*args, **kwargs)
