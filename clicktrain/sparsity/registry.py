"""The registry of an axis: its keys are the choices of the command line, of YAML files, help and errors.

A setting that is a choice is annotated with its registry, ``Annotated[str | Criterion, CRITERIA]``; whoever
shows or checks the setting reads the keys from there when it is needed. A choice is a key, the name of an
installed entry point, ``package.module:function``, or (in Python) the function itself.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from clicktrain.errors import UserError, shortened, shown
from clicktrain.own_code import FromFile, import_own, is_own, require_named, split_name

T = TypeVar("T")
F = TypeVar("F")


class Registry(Mapping[str, T], Generic[T]):
    """The choices of one axis by key, in the order in which they are shown.

    Args:
        what: one choice of the axis, in a sentence: "criterion".
        entries: the choices of the library.
        group: of entry points with further choices, as ``clicktrain.criteria``.
        beneath: another registry whose keys count too, where ``entries`` have none of that name.
        adapt: makes a choice of this registry from one of ``beneath``; a user's own is one of ``beneath``.
        guard: wraps a user's own function, given its name, in checks of what it returns.
        fits: whether a value can be a choice: any function, by default.
        wanted: what a choice of the user's own is, if not a function, and ``own`` how one is typed.
        trial: calls a user's own on small arguments, given the layers of a network.
    """

    def __init__(
        self,
        what: str,
        entries: Mapping[str, T] | None = None,
        *,
        group: str | None = None,
        beneath: Registry[Any] | None = None,
        adapt: Callable[[Any], T] | None = None,
        guard: Callable[[str, T], T] | None = None,
        fits: Callable[[object], bool] = callable,
        wanted: str = "",
        own: str = "package.module:function",
        trial: Callable[[T, Sequence[Any]], object] | None = None,
    ) -> None:
        self._fits, self._wanted, self.own, self._trial = fits, wanted, own, trial
        self.what, self._entries, self._group = what, dict(entries or {}), group
        self._beneath, self._adapt, self._guard = beneath, adapt, guard
        self._own: dict[str, tuple[object, T]] = {}
        """A user's own that have been resolved, by name: as they were given, and guarded."""
        self._library = frozenset(self._entries)

    __eq__ = object.__eq__
    __hash__ = object.__hash__
    # ---- the mapping ----------------------------------------------------------------------------

    def __getitem__(self, key: str) -> T:
        if key in self._entries:
            return self._entries[key]
        if self._beneath is not None and key in self._beneath:
            return self._lower(self._beneath[key])
        point = self._points().get(key)
        if point is None:
            raise KeyError(key)
        if key not in self._own:
            return self._resolved(key, _loaded(self.what, point))
        return self._own[key][1]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._entries, **dict.fromkeys(self._beneath or ()), **self._points()})

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _points(self) -> Mapping[str, EntryPoint]:
        return {} if self._group is None else _installed(self._group)

    def _lower(self, value: Any) -> T:
        """A choice of the registry beneath as one of this."""
        lower: T = value if self._adapt is None else self._adapt(value)
        return lower

    def _guarded(self, name: str, value: T) -> T:
        return value if self._guard is None else self._guard(name, value)

    def register(self, key: str) -> Callable[[F], F]:
        """Decorate a function, or call the result with a value: from now on ``key`` is a choice.

        Raises:
            ValueError: there is one of that name, or the name cannot be typed as a choice.
        """
        if key in self or not key or not key.replace("-", "_").isidentifier():
            raise ValueError(f"{key!r} cannot be a new {self.what}: it is taken, or not a name")

        def add(function: F) -> F:
            self._entries[key] = self._guarded(key, function)  # type: ignore[arg-type]
            return function

        return add

    def remove(self, key: str) -> None:
        """Take a registered choice back."""
        del self._entries[key]

    # ---- settings -------------------------------------------------------------------------------

    @property
    def choices(self) -> str:
        """All choices, as they are typed."""
        return ", ".join(self) + f" or {self.own}"

    def check(self, setting: str, value: object) -> str | T:
        """A valid value of a setting; a function that has a name becomes its name. Imports nothing.

        Raises:
            UserError: it is no choice.
        """
        if isinstance(value, str):
            if is_own(value):
                split_name(value, self._how)
                return value
            if value in self:
                return value
        elif self._fits(value):
            return self._name(value) or value  # type: ignore[return-value]
        raise UserError(f"{setting} must be one of {self.choices}, not {shown(value)}")

    def resolve(self, choice: object) -> T:
        """The function that a checked setting means; a user's own is imported at the first call.

        Raises:
            UserError: it cannot be imported, is no function, or only a file names it.
        """
        if self._beneath is not None and (not isinstance(choice, str) or is_own(choice)):
            return self._lower(self._beneath.resolve(choice))
        if not isinstance(choice, str):
            return self._resolved(_title(choice), choice)
        if isinstance(choice, FromFile):
            require_named(choice, "a file", None, self.what)
        if choice in self._own:
            return self._own[choice][1]
        if not is_own(choice):
            return self[choice]
        function = import_own(choice, self._how)
        return self._resolved(choice, function)

    def try_out(self, setting: str, choice: object, layers: Sequence[Any]) -> None:
        """Call a user's own once on small arguments, made from some of these layers.

        Raises:
            UserError: it fails, or returns something else than the axis wants; names the setting.
        """
        if isinstance(choice, str) and choice in self._library:
            return
        if self._beneath is not None and not (isinstance(choice, str) and choice in self._entries):
            self._beneath.try_out(setting, choice, layers)
        elif self._trial is not None:
            try:
                self._trial(self.resolve(choice), layers)
            except UserError as error:
                if setting.replace("_", " ") in str(error):
                    raise
                raise UserError(f"{setting} {choice_name(choice)!r}: {error}") from error

    def _resolved(self, name: str, function: Any) -> T:
        """Guard and keep a user's function; the same function under the same name is guarded once."""
        if name not in self._own or self._own[name][0] is not function:
            if not self._fits(function):
                raise UserError(f"{self.what} {name!r} is of type {type(function).__name__}: {self._how}")
            self._own[name] = function, self._guarded(name, function)
        return self._own[name][1]

    @property
    def _how(self) -> str:
        return f"a {self.what} of your own is {self._wanted}named as {self.own}"

    def _name(self, function: Any) -> str | None:
        """The key or the ``package.module:name`` under which a function is found again, or None."""
        for key, value in self._entries.items():
            if getattr(value, "__wrapped__", value) is function:
                return key
        if self._beneath is not None:
            return self._beneath._name(function)
        module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
        if module in (None, "__main__") or getattr(sys.modules.get(module), name, None) is not function:
            return None
        self._resolved(f"{module}:{name}", function)
        return f"{module}:{name}"


def choice_name(value: object) -> str:
    """How a choice is shown in plans, events and reports."""
    return value if isinstance(value, str) else _title(value)


def _title(value: object) -> str:
    return shortened(str(getattr(value, "__qualname__", type(value).__name__)), 80)


def smallest(layers: Sequence[Any]) -> Any:
    """The layer with the fewest weights, on which a trial costs least."""
    return min(layers, key=lambda layer: layer.weight.numel())


def _loaded(what: str, point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:
        raise UserError(f"{what} {point.name!r} ({point.value}) cannot be loaded: {error}") from error


@functools.cache
def _installed(group: str) -> Mapping[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}
