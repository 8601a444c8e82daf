"""Publishes what a pruner decides and does: typed events, and changes of the network."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from clicktrain.runs.events import Event
from clicktrain.surgery import SurgeryPlan


@dataclass(frozen=True, eq=False)
class Notification:
    """A change of the network or a moment of the run; unlike an `Event` it is never written to a file."""


@dataclass(frozen=True, eq=False)
class ParametersReplaced(Notification):
    """Parameters are other tensors now: channels were removed, or convolutions packed or unpacked."""


@dataclass(frozen=True, eq=False)
class ChannelsRemoved(Notification):
    """A surgery plan was carried out; also when a saved state is loaded, once for every plan of it."""

    plan: SurgeryPlan


@dataclass(frozen=True, eq=False)
class MasksMoved(Notification):
    """Packed layers keep other positions; also when a state is loaded.

    Their values are the same parameters, unless the number of kept weights has changed.
    """


@dataclass(frozen=True, eq=False)
class MasksFrozen(Notification):
    """Masks do not change any more, and the network is packed if it is to be; also when a state is loaded."""


@dataclass(frozen=True, eq=False)
class EpochEnd(Notification):
    """The last step of an epoch; the method has decided, and nothing of that is carried out yet.

    ``epoch`` counts from 1.
    """

    epoch: int


Kind: TypeAlias = type[Any] | tuple[type[Any], ...]
W = TypeVar("W", bound=Callable[..., Any])


class Publisher:
    """Calls subscribers, each with the kinds it asked for, in the order in which they subscribed."""

    def __init__(self) -> None:
        self._listeners: OrderedDict[int, tuple[Kind, Callable[[Any], object]]] = OrderedDict()

    def subscribe(self, listener: Callable[[Any], object], kind: Kind | None = None) -> RemovableHandle:
        """Call a function with everything of a kind that is published; see `Pruner.subscribe`."""
        handle = RemovableHandle(self._listeners)
        self._listeners[handle.id] = (Event, Notification) if kind is None else kind, listener
        return handle

    def publish(self, what: Event | Notification) -> None:
        """Call the subscribers."""
        for kind, listener in list(self._listeners.values()):
            if isinstance(what, kind):
                listener(what)


class Wrapped(Generic[W]):
    """A wrapper around the network, rebuilt whenever parameters are replaced; see `Pruner.wrapped`.

    DistributedDataParallel puts gradients of fixed sizes into buckets; `torch.compile` and CUDA graphs are
    made for fixed shapes. Whatever else the process has compiled is compiled again when it is called.
    """

    def __init__(self, model: nn.Module, publisher: Publisher, wrap: Callable[[nn.Module], W]) -> None:
        self._model, self._wrap = model, wrap
        self._current: W | None = None
        self._outdated = False
        itself = weakref.ref(self)

        def outdate(_: ParametersReplaced) -> None:
            if (wrapped := itself()) is not None:
                wrapped._outdated = True

        weakref.finalize(self, publisher.subscribe(outdate, ParametersReplaced).remove)

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

    def renew(self) -> None:
        """Wrap the network again before it runs the next time."""
        self._outdated = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network."""
        return self.current(*args, **kwargs)
