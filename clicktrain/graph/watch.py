"""What a forward pass reads and does beside computing: attributes, globals, writes, recomputation.

A graph holds operations on tensors. Everything else that ``forward`` looked at is a constant in it, and
everything else that ``forward`` did is not in it at all. Both are recorded here while it is traced.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx, nn

_INTERNAL = frozenset(nn.Module().__dict__) - {"training"} | {"forward", "_is_hf_initialized"}
_LIBRARIES = ("torch.", "clicktrain.")


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A plain value that ``forward`` read while it was traced: a constant in the graph.

    Attributes:
        path: of the module that the attribute belongs to; None for a global or a class's own attribute.
        name: of the attribute or the global.
        value: what it was.
        reader: path of the module whose ``forward`` read it.
        home: where a value that belongs to no module is found: a namespace that maps names to values.
    """

    path: str | None
    name: str
    value: Any
    reader: str
    home: Any = None


class Watch:
    """Records what one thread reads and does; modules are named by a function."""

    def __init__(self, paths: dict[nn.Module, str], reader: Callable[[], str]) -> None:
        self._paths, self._reader = paths, reader
        self._thread = threading.get_ident()
        self._reads: dict[tuple[Any, str], Read] = {}
        self._seen: set[tuple[CodeType, int]] = set()
        self.unnoticed: set[str] = set()
        """Names of attributes that the tracer itself sets."""
        self.effects: dict[str, str] = {}
        """By the path of a module what its ``forward`` does that no graph holds; the first of several."""

    @property
    def reads(self) -> tuple[Read, ...]:
        """In the order in which they were first read."""
        return tuple(self._reads.values())

    def note(self, reason: str, path: str | None = None) -> None:
        """Remember an effect of the module that runs now, or of another."""
        self.effects.setdefault(self._reader() if path is None else path, reason)

    def forget(self) -> None:
        """Let go of the modules that were watched; what was recorded stays."""
        self._paths = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Patch `nn.Module` for this thread; one at a time in a process."""
        patched: Any = nn.Module
        if "__getattribute__" in nn.Module.__dict__:
            raise RuntimeError("a forward pass is being watched already")
        plain_set, before = nn.Module.__setattr__, sys.getprofile()

        def get(module: nn.Module, name: str) -> Any:
            value = object.__getattribute__(module, name)
            if name not in _INTERNAL and threading.get_ident() == self._thread:
                self._read(module, name, value)
            return value

        def put(module: nn.Module, name: str, value: Any) -> None:
            if threading.get_ident() == self._thread and module in self._paths:
                self._written(module, name, value)
            plain_set(module, name, value)

        # Callbacks of the garbage collector would pass for the network's own code.
        collects = gc.isenabled()
        gc.disable()
        patched.__getattribute__, patched.__setattr__ = get, put
        # cProfile could not be put back: its profile then lacks nothing, and globals are not recorded.
        profile = before is None or callable(before)
        if profile:
            sys.setprofile(self._called)
        try:
            yield
        finally:
            if profile:
                sys.setprofile(before)
            patched.__setattr__ = plain_set
            del patched.__getattribute__
            if collects:
                gc.enable()

    def _read(self, module: nn.Module, name: str, value: Any) -> None:
        path = self._paths.get(module)
        own = object.__getattribute__(module, "__dict__")
        if name in own:
            if path is not None and not isinstance(value, (torch.Tensor, fx.Proxy)):
                self._reads.setdefault((path, name), Read(path, name, value, self._reader()))
            return
        for kind in type(module).__mro__:
            if name in kind.__dict__:
                plain = not callable(value) and not hasattr(kind.__dict__[name], "__get__")
                if plain and not f"{kind.__module__}.".startswith(_LIBRARIES):
                    home = vars(kind)
                    self._reads.setdefault((id(home), name), Read(None, name, value, self._reader(), home))
                return

    def _written(self, module: nn.Module, name: str, value: Any) -> None:
        own = module.__dict__
        if name in self.unnoticed or (name in own and own[name] is value):
            return
        if isinstance(value, nn.Module):
            self.note(f"puts a layer into .{name}")
        elif name in own["_buffers"]:
            self.note(f"assigns buffer {name}")
        elif name in own["_parameters"]:
            self.note(f"assigns parameter {name}")
        elif isinstance(value, (int, float)) and isinstance(own.get(name), (int, float)):
            self.note(f"changes .{name} at each call")
        else:
            self.note(f"sets .{name}")

    def _called(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code, names = frame.f_code, frame.f_globals
        key = (code, id(names))
        if key in self._seen:
            return
        self._seen.add(key)
        home = f"{names.get('__name__', '')}."
        if home.startswith("torch.utils.checkpoint."):
            self.note("uses torch.utils.checkpoint")
        if home.startswith(_LIBRARIES) or home.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
            return
        for name in code.co_names:
            if name in names and not name.startswith("__") and is_plain(names[name]):
                read = Read(None, name, names[name], self._reader(), names)
                self._reads.setdefault((id(names), name), read)


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text or nothing, or a container of such: something to compare."""
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return True
    if isinstance(value, (tuple, list, set, frozenset)):
        return len(value) <= 64 and all(map(is_plain, value))
    if isinstance(value, dict):
        return len(value) <= 64 and all(map(is_plain, value)) and all(map(is_plain, value.values()))
    return False
