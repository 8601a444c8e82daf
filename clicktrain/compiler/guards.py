"""Conditions under which a lowered graph holds: checked before each call, in microseconds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import repeat
from typing import Any

from torch import nn

from clicktrain.graph import ModelGraph, Read, is_plain
from clicktrain.graph.inside import inside

_INSIDE = 256
"""Values inside one value that are looked at."""
_GET: Callable[[Mapping[str, Any], str], Any] = dict.get  # type: ignore[assignment]


class Guards:
    """Values that are constants in a lowered graph, and the layers that it was made of."""

    def __init__(self, graph: ModelGraph, stepped: Iterable[nn.Module]) -> None:
        model, stepped = graph.model, list(stepped)
        entries: list[_Entry] = []
        for read in graph.reads:
            home = read.home if read.path is None else model.get_submodule(read.path).__dict__
            entries += _entries(home, read.name, read, graph.names)
        for module in dict.fromkeys(stepped):
            entries += [e for name in _settings(module) for e in _entries(module.__dict__, name)]
        entered = [model.get_submodule(path) for path in graph.entered]
        self._entries = entries
        # Compared in C, by columns: this is done before each call.
        plain = [e for e in entries if type(e.home) is dict and is_plain(e.value)]
        known = [e for e in entries if type(e.home) is dict and not is_plain(e.value)]
        self._others = [e for e in entries if type(e.home) is not dict]
        self._homes, self._names = [e.home for e in plain], [e.name for e in plain]
        self._values = [e.value for e in plain]
        self._known_homes, self._known_names = [e.home for e in known], [e.name for e in known]
        self._ids = [id(e.value) for e in known]
        self._own = [module.__dict__ for module in dict.fromkeys((*entered, *stepped))]
        self._forwards = [home.get("forward") for home in self._own]
        self._children = [(m._modules, list(m._modules.values())) for m in _containers(graph)]

    def hold(self) -> bool:
        """Whether nothing has changed."""
        return (
            list(map(_GET, self._homes, self._names)) == self._values
            and list(map(id, map(_GET, self._known_homes, self._known_names))) == self._ids
            and list(map(_GET, self._own, repeat("forward"))) == self._forwards
            and all(list(table.values()) == known for table, known in self._children)
            and all(e.same() for e in self._others)
        )

    def changed(self) -> list[Read]:
        """List what ``forward`` read that has changed."""
        return [e.read for e in self._entries if e.read is not None and not e.same()]

    def allows(self, training: Mapping[str, bool]) -> bool:
        """Whether the graph holds for these modes of modules too, by path."""
        return all(
            training[e.read.path] == e.value
            for e in self._entries
            if e.read is not None and e.read.path is not None and e.name == "training"
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    home: Any
    name: Any
    value: Any
    read: Read | None

    def same(self) -> bool:
        now = self.home.get(self.name)
        return now is self.value or (is_plain(self.value) and bool(now == self.value))


def _entries(home: Any, name: str, read: Read | None = None, names: Set[str] = frozenset()) -> list[_Entry]:
    """A value, and all inside it that code with these names can have read."""
    entries: list[_Entry] = []
    ways, known = [(home, name)], set()
    for home, name in ways:  # grows
        value = home.get(name)
        entries.append(_Entry(home, name, copy.deepcopy(value) if is_plain(value) else value, read))
        if id(value) not in known and not is_plain(value) and len(ways) < _INSIDE:
            known.add(id(value))
            ways += inside(value, names)
    return entries


def _settings(module: nn.Module) -> tuple[str, ...]:
    """Attributes of a layer that its step was made with; a batch norm's are read at each call."""
    if hasattr(module, "in_channels"):
        return ("stride", "padding", "dilation", "groups")
    names = () if isinstance(module, nn.BatchNorm2d) else getattr(module, "__constants__", ())
    return tuple(name for name in names if name in module.__dict__)


def _containers(graph: ModelGraph) -> list[nn.Module]:
    closed = tuple(f"{path}." for path in graph.opaque)
    return [
        module
        for path, module in graph.model.named_modules()
        if module._modules and path not in graph.opaque and not f"{path}.".startswith(closed)
    ]
