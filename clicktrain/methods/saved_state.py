"""States of methods as nested dicts of tensors, numbers and strings, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor

S = TypeVar("S")


def saved_state(state: Any) -> dict[str, Any]:
    """The fields of a state, a dataclass, but those with ``compare=False``: they follow from the others."""
    return {own.name: _plain(getattr(state, own.name)) for own in fields(state) if own.compare}


def restored_state(kind: type[S], saved: Mapping[str, Any]) -> S:
    """The inverse of `saved_state`. Tensors are copies on the CPU."""
    hints = get_type_hints(kind)
    return kind(**{name: _restored(hints[name], value) for name, value in saved.items()})


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return saved_state(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _restored(hint: Any, value: Any) -> Any:
    """A saved value as the type that an annotation names."""
    if isinstance(value, Tensor):
        return value.to("cpu", copy=True)
    if get_origin(hint) in (Union, UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if isinstance(value, Mapping):
        if is_dataclass(hint) and isinstance(hint, type):
            return restored_state(hint, value)
        each_hint = (*get_args(hint), Any)[1]
        return {key: _restored(each_hint, each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        if hasattr(hint, "_fields"):  # a NamedTuple
            return hint(*map(_restored, get_type_hints(hint).values(), value))
        each_hint = (*get_args(hint), Any)[0]
        return (get_origin(hint) or list)(_restored(each_hint, each) for each in value)
    return value
