"""Build frozen dataclasses from plain dictionaries (YAML, command line); one clear sentence per mistake."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin

from clicktrain.errors import UserError, shortened, shown

T = TypeVar("T")


@typing.runtime_checkable
class Choices(Protocol):
    """What a setting that is a choice is annotated with, as `clicktrain.sparsity.registry.Registry`."""

    own: str
    """How a user's own choice is typed."""

    def __iter__(self) -> Any:
        """The keys."""

    def check(self, setting: str, value: object) -> Any:
        """A valid value, or a UserError with the choices in it."""

    def try_out(self, setting: str, choice: object, layers: Sequence[Any]) -> None:
        """Call a user's own once; a UserError if it cannot be used."""


class SaidOnce:
    """Settings of which a constructor's call may not give two that say the same thing in other words.

    That one of them has its default's value makes no difference. A call that spells out every field is a copy
    (`dataclasses.replace`) or reads a file (`build`): both hold defaults that nobody gave.
    """

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Settings that say the same thing in other words: of each group, a user gives one."""

    def __new__(cls, *unused: Any, **given: Any) -> Any:
        """Check what is given; UserError if one thing is said twice."""
        del unused
        both = said_twice(cls.alternatives, given)
        if both is not None and len(given) < len(field_names(cls)):
            what = " and ".join(f"{name} {shown(given[name])}" for name in both)
            raise UserError(f"{what} are both given, and say the same thing: give one")
        return super().__new__(cls)


def said_twice(groups: Iterable[Sequence[str]], given: Mapping[Any, Any]) -> tuple[str, str] | None:
    """The first two of the settings in a group that are both given, and not None."""
    for group in groups:
        both = [name for name in group if given.get(name) is not None]
        if len(both) > 1:
            return both[0], both[1]
    return None


def field_names(cls: Any) -> tuple[str, ...]:
    """Names of the fields of a dataclass that its constructor takes."""
    return tuple(f.name for f in dataclasses.fields(cls) if f.init)


def type_hints(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, with the registries that they are annotated with."""
    return _cached_hints(cls)


@functools.cache
def _cached_hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def choices_in(hint: Any) -> Choices | None:
    """The registry that a type is annotated with, alone or as one of several (``... | None``)."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return next((extra for extra in args[1:] if isinstance(extra, Choices)), None)
    if origin in (Union, types.UnionType):
        return next((choices for arg in args if (choices := choices_in(arg)) is not None), None)
    return None


def choice_fields(cls: type) -> dict[str, Choices]:
    """The settings of a dataclass that are choices of a registry."""
    hints = type_hints(cls)
    fields = {name: choices_in(hints[name]) for name in field_names(cls)}
    return {name: choices for name, choices in fields.items() if choices is not None}


def part_of(kind: type[T], settings: Any) -> T:
    """A part of a method: a dataclass, from the settings that have the names of its fields."""
    return kind(**{name: getattr(settings, name) for name in field_names(kind)})


def check_choices(settings: Any) -> None:
    """Check every setting of a frozen dataclass that is one of some words or a choice of a registry.

    Lists, as they come from YAML, become tuples, so that settings can be compared and hashed.

    Raises:
        UserError: another value; names those that there are.
    """
    for name in field_names(type(settings)):
        hint, value = type_hints(type(settings))[name], getattr(settings, name)
        if value is None and type(None) in get_args(hint):
            continue
        if get_origin(hint) is tuple:
            object.__setattr__(settings, name, (value,) if isinstance(value, str) else tuple(value))
        if (choices := choices_in(hint)) is not None:
            object.__setattr__(settings, name, choices.check(name, value))
        elif (words := _words_in(hint)) and value not in words:
            raise UserError(f"{name} must be one of {', '.join(words)}, not {shown(value)}")


def try_choices(settings: Any, layers: Sequence[Any]) -> None:
    """Call every function of the user's own among the settings once, on small arguments from these layers.

    Raises:
        UserError: it cannot be used.
    """
    for name, choices in choice_fields(type(settings)).items():
        value = getattr(settings, name)
        if value is not None and layers:
            choices.try_out(name, value, layers)


def _words_in(hint: Any) -> tuple[str, ...]:
    """What a Literal, alone or beside None, allows; nothing for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    parts = [arg for arg in get_args(hint) if arg is not type(None)]
    union = get_origin(hint) in (Union, types.UnionType)
    return get_args(parts[0]) if union and len(parts) == 1 and get_origin(parts[0]) is Literal else ()


def unknown_field(name: str, valid: Iterable[str]) -> UserError:
    """The error for a setting that does not exist; names the nearest one that does."""
    names = sorted(valid)
    close = difflib.get_close_matches(name[:80], names, n=1)
    hint = f"did you mean '{close[0]}'?" if close else "'clicktrain train --help' lists the settings"
    return UserError(f"unknown setting '{shortened(name, 80)}': {hint}")


def build(cls: type[T], settings: Mapping[str, Any]) -> T:
    """Construct the dataclass ``cls`` from ``settings``, converting values to the annotated types.

    YAML reads ``5e-4`` as text and ``1`` as an integer; both are accepted where a float is asked for.

    Raises:
        UserError: unknown field (names the nearest), or a value of another type (names field and type).
    """
    hints = type_hints(cls)
    valid = field_names(cls)
    for name in settings:
        if name not in valid:
            raise unknown_field(name, valid)
    given = {name: convert(name, value, hints[name]) for name, value in settings.items()}
    return cls(**{**_defaults(cls), **given})


def _defaults(cls: Any) -> dict[str, Any]:
    """The values of the fields that need not be given."""
    values = {}
    for field in dataclasses.fields(cls):
        if field.init and field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.init and field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return values


def convert(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` wants it; UserError that names the field when it does not fit."""
    origin, args = get_origin(hint), get_args(hint)
    if (choices := choices_in(hint)) is not None:
        return None if value is None and type(None) in args else choices.check(name, value)
    if origin in (Union, types.UnionType):
        return _convert_union(name, value, args)
    if origin is Literal:
        if value in args:
            return value
        raise UserError(f"{name} is {shown(value)}: use one of {', '.join(str(a) for a in args)}")
    if hint is bool:
        fits = isinstance(value, bool)
    elif hint is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif hint is float:
        return _convert_float(name, value)
    elif hint is str:
        fits = isinstance(value, str)
    elif origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        if not isinstance(value, list | tuple):
            raise UserError(f"{name} is {shown(value)}: a list is needed, as in [0.5, 0.75]")
        return tuple(convert(name, item, args[0]) for item in value)
    elif origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise UserError(f"{name} is {shown(value)}: a list of {len(args)} values is needed")
        return tuple(convert(name, item, arg) for item, arg in zip(value, args, strict=True))
    elif origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{name} is {shown(value)}: a mapping is needed, as in {{layer2: 4}}")
        return {convert(name, k, args[0]): convert(name, v, args[1]) for k, v in value.items()}
    else:
        return value
    if not fits:
        raise UserError(f"{name} is {shown(value)}: a value of type {hint.__name__} is needed")
    return value


def _convert_union(name: str, value: Any, args: tuple[Any, ...]) -> Any:
    if value is None and type(None) in args:
        return None
    options = [arg for arg in args if arg is not type(None)]
    problems: list[UserError] = []
    for option in options:
        try:
            return convert(name, value, option)
        except UserError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    right = [
        ", ".join(map(str, get_args(o))) if get_origin(o) is Literal else _WORDS.get(o, str(o))
        for o in options
    ]
    raise UserError(f"{name} is {shown(value)}: use {' or '.join(right)}")


_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def _convert_float(name: str, value: Any) -> float:
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
            if not math.isnan(number):
                return number
        except (ValueError, OverflowError):
            pass
    raise UserError(f"{name} is {shown(value)}: a number is needed")


def to_plain(settings: Any) -> dict[str, Any]:
    """The fields of a frozen dataclass as YAML knows them (tuples become lists).

    Raises:
        UserError: a setting holds a function without a name under which it could be found again.
    """
    return {name: _plain(name, getattr(settings, name)) for name in field_names(type(settings))}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(name, item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(name, item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float):
        return value
    raise UserError(
        f"{name} is {getattr(value, '__qualname__', type(value).__name__)}, which no file can name: "
        "define it at the top of a module, or register it under a key"
    )
