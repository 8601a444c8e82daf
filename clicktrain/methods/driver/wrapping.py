"""Wrappers around a network, rebuilt whenever its parameters are replaced.

DistributedDataParallel puts gradients of fixed sizes into buckets; `torch.compile` and CUDA graphs are made
for fixed shapes. All of these are outdated once channels have been removed (PruneTrain 4.2) or convolutions
packed. Whatever else the process has compiled is then compiled again when it is called.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from clicktrain.methods.driver.publisher import ParametersReplaced, Publisher

W = TypeVar("W", bound=Callable[..., Any])


class Wrapped(Generic[W]):
    """What a loop calls instead of the network; made by `Pruner.wrapped`."""

    def __init__(self, model: nn.Module, publisher: Publisher, wrap: Callable[[nn.Module], W]) -> None:
        self._model, self._wrap = model, wrap
        self._current: W | None = None
        self._outdated = False
        itself = weakref.ref(self)

        def outdate(_: ParametersReplaced) -> None:
            if (wrapped := itself()) is not None:
                wrapped._outdated = True

        handle = publisher.subscribe(outdate, ParametersReplaced)
        weakref.finalize(self, handle.remove)

    @property
    def current(self) -> W:
        """The wrapper around the network as it is: for ``no_sync()`` and the like."""
        if self._current is None or self._outdated:
            if self._current is not None:
                self._current = None  # first: two of them must not hold on to the same parameters
                torch.compiler.reset()  # which keeps few versions of one function, and then uses none
            self._current = self._wrap(self._model)
            self._outdated = False
        return self._current

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network."""
        return self.current(*args, **kwargs)
