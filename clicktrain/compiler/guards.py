"""What has to be as it was when a network was lowered: looked at before each call, in microseconds."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from clicktrain.graph import ModelGraph, Read, is_plain

_MISSING = object()
_CONV = ("stride", "padding", "dilation", "groups")


class Guards:
    """Values that are constants in a lowered graph, and the layers that it was made of."""

    def __init__(self, graph: ModelGraph, stepped: Iterable[nn.Module]) -> None:
        """Take the state of a model down.

        Args:
            graph: of the model, with what its ``forward`` read.
            stepped: layers that are not called any more, others compute for them.
        """
        stepped = list(dict.fromkeys(stepped))
        model = graph.model
        self._same: list[tuple[Mapping[str, Any], str, Any, Read | None]] = []
        self._equal: list[tuple[Mapping[str, Any], str, Any, Read | None]] = []
        for read in graph.reads:
            home = read.home if read.path is None else model.get_submodule(read.path).__dict__
            self._add(home, read.name, read)
        for module in (*map(model.get_submodule, graph.entered), *stepped):
            self._add(module.__dict__, "forward", None)
        for module in stepped:
            names = _CONV if hasattr(module, "in_channels") else getattr(module, "__constants__", ())
            for name in names:
                if name in module.__dict__:
                    self._add(module.__dict__, name, None)
        self._children = [(module._modules, tuple(module._modules.values())) for module in _containers(graph)]

    def hold(self) -> bool:
        """Whether everything is as it was."""
        for home, name, value, _ in self._same:
            if home.get(name, _MISSING) is not value:
                return False
        for home, name, value, _ in self._equal:
            if home.get(name, _MISSING) != value:
                return False
        return all(tuple(table.values()) == known for table, known in self._children)

    def changed(self) -> list[Read]:
        """What ``forward`` read that is not as it was."""
        return [
            read
            for home, name, value, read in (*self._same, *self._equal)
            if read is not None
            and home.get(name, _MISSING) is not value
            and home.get(name, _MISSING) != value
        ]

    def allows(self, training: Mapping[str, bool]) -> bool:
        """Whether the graph holds for these modes of modules too, by path."""
        return all(
            training[read.path] == value
            for _, name, value, read in (*self._same, *self._equal)
            if read is not None and read.path is not None and name == "training"
        )

    def _add(self, home: Mapping[str, Any], name: str, read: Read | None) -> None:
        value = home.get(name, _MISSING)
        # Whatever may be equal without being the same object is compared.
        if value is _MISSING or value is None or isinstance(value, bool) or not is_plain(value):
            self._same.append((home, name, value, read))
        else:
            self._equal.append((home, name, copy.deepcopy(value), read))
        if not is_plain(value) and type(value).__module__ != "builtins":
            inside: dict[str, Any] = getattr(value, "__dict__", {})
            for part, held in list(inside.items()):
                if is_plain(held) and not callable(value) and not isinstance(value, nn.Module):
                    self._equal.append((inside, part, copy.deepcopy(held), read))


def _containers(graph: ModelGraph) -> list[nn.Module]:
    """Modules with children that the graph looks into."""
    closed = tuple(f"{path}." for path in graph.opaque)
    return [
        module
        for path, module in graph.model.named_modules()
        if module._modules and path not in graph.opaque and not f"{path}.".startswith(closed)
    ]
