"""What a forward pass reads and does beside computing: attributes, globals, writes, recomputation.

A graph holds operations on tensors. Everything else that ``forward`` looked at is a constant in it, and
everything else that ``forward`` did is not in it at all. Both are recorded here while it is traced.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CellType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import fx, nn

_INTERNAL = frozenset(nn.Module().__dict__) - {"training"} | {"forward", "_is_hf_initialized"}
_LIBRARIES = ("torch.", "clicktrain.", "numpy.")
_MANY = 256
"""Items of a container that is compared by value."""


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A value that ``forward`` read while it was traced: a constant in the graph, with all that is inside.

    Attributes:
        path: of the module that the attribute belongs to; None for a global, a variable of an enclosing
            function, a class's own attribute, or whatever else is looked up in ``home``.
        reader: path of the module whose ``forward`` read it.
        home: where a value that belongs to no module is found: something with ``get(name)``.
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
        self._seen: set[tuple[Any, ...]] = set()
        self.names: set[str] = set()
        """All names, and texts that could be names, in the user's code that was called: what is inside an
        object and is not among them was not read."""
        self.unnoticed: set[str] = set()
        """Names of attributes that the tracer itself sets."""
        self.effects: dict[str, str] = {}
        """By the path of a module what its ``forward`` does that no graph holds; the first of several."""

    @property
    def reads(self) -> tuple[Read, ...]:
        """In the order in which they were first read."""
        return tuple(self._reads.values())

    def note(self, reason: str, path: str | None = None) -> None:
        """Note an effect of the module that runs now, or of another."""
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
            if not isinstance(value, (torch.Tensor, fx.Proxy)):
                self._keep(path, name, value, own)
            return
        for kind in type(module).__mro__:
            if name in kind.__dict__:
                if name.startswith("__") or f"{kind.__module__}.".startswith(_LIBRARIES):
                    return
                if callable(value) or not hasattr(kind.__dict__[name], "__get__"):
                    self._keep(None, name, value, vars(kind))
                if callable(value):  # nothing hides the method yet
                    self._keep(path, name, None, own)
                return

    def _keep(self, path: str | None, name: str, value: Any, home: Any) -> None:
        """Record a read: by module path for a module's attribute, else by the object that holds the name."""
        key = (id(home) if path is None else path, name)
        if key not in self._reads:
            self._reads[key] = Read(path, name, value, self._reader(), home if path is None else None)

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

    def _called(self, frame: FrameType, event: str, called: Any) -> None:
        if event == "c_call":
            variable = getattr(called, "__self__", None)
            user = not _of_a_library(f"{frame.f_globals.get('__name__', '')}.")
            if isinstance(variable, contextvars.ContextVar) and called.__name__ == "get" and user:
                self._keep(None, variable.name, variable.get(None), ContextHome(variable))
            return
        if event != "call":
            return
        code, names = frame.f_code, frame.f_globals
        if code is _LOOK_UP:
            key = frame.f_locals["key"]
            self._keep(None, key, os.environ.get(key), os.environ)
        free = code.co_freevars != ("__class__",) and code.co_freevars
        held = tuple(map(frame.f_locals.get, free)) if free else ()
        if (seen := (code, id(names), *map(id, held))) in self._seen:
            return
        self._seen.add(seen)
        home = f"{names.get('__name__', '')}."
        if home.startswith("torch.utils.checkpoint."):
            self.note("uses torch.utils.checkpoint")
        if _of_a_library(home):
            return
        texts = (text for text in code.co_consts if isinstance(text, str))
        self.names.update(name for name in (*code.co_names, *texts) if not name.startswith("__"))
        for name in code.co_names:
            if name in names and not name.startswith("__") and may_change(names[name]):
                self._keep(None, name, names[name], names)
        if free and any(map(may_change, held)):
            for name, cell in _cells(code, held):
                if may_change(cell.cell_contents):
                    self._keep(None, name, cell.cell_contents, CellHome(cell))


_LOOK_UP = type(os.environ).__getitem__.__code__


@dataclass(frozen=True, slots=True)
class CellHome:
    """The variable of an enclosing function, under any name."""

    cell: CellType

    def get(self, _: str) -> Any:
        """Its value; None where it has been deleted."""
        try:
            return self.cell.cell_contents
        except ValueError:
            return None


@dataclass(frozen=True, slots=True)
class ContextHome:
    """A context variable, under any name."""

    variable: contextvars.ContextVar[Any]

    def get(self, _: str) -> Any:
        """Its value in the context of the call."""
        return self.variable.get(None)


def _cells(code: CodeType, held: tuple[Any, ...]) -> Iterator[tuple[str, CellType]]:
    """Variables that a function with this code and these values shares with the one around it."""
    # A frame does not know its function.
    for function in gc.get_referrers(code):
        if isinstance(function, FunctionType) and function.__code__ is code:
            cells = function.__closure__ or ()
            now = [CellHome(cell).get("") for cell in cells]
            if all(map(lambda a, b: a is b, now, held)):
                yield from zip(code.co_freevars, cells, strict=True)


def _of_a_library(home: str) -> bool:
    return home.startswith(_LIBRARIES) or home.partition(".")[0] in sys.stdlib_module_names - {"__main__"}


def may_change(value: Any) -> bool:
    """Whether a value that is found outside of the model is worth another look at each call."""
    if isinstance(value, (nn.Module, fx.Proxy)):
        return False  # guarded where they hang, or of this trace
    if isinstance(value, ModuleType):
        return not _of_a_library(f"{value.__name__}.")
    if isinstance(value, type) or callable(value):
        return not _of_a_library(f"{getattr(value, '__module__', None)}.")
    return True


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a text or nothing, or a container of such: something to compare."""
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return True
    if isinstance(value, (tuple, list, set, frozenset)):
        return len(value) <= _MANY and all(map(is_plain, value))
    if isinstance(value, dict):
        return len(value) <= _MANY and all(map(is_plain, value)) and all(map(is_plain, value.values()))
    return False
