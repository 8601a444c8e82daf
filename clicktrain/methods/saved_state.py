"""States of methods as nested dicts of tensors, numbers and strings, and back."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

S = TypeVar("S")


def saved_state(state: Any) -> dict[str, Any]:
    """The fields of a state, a dataclass, but those with ``compare=False``: they follow from the others."""
    return {own.name: _plain(getattr(state, own.name)) for own in fields(state) if own.compare}


def restored_state(kind: type[S], saved: Mapping[str, Any], device: torch.device | str = "cpu") -> S:
    """The inverse of `saved_state`. Tensors are copies on the device."""
    hints = get_type_hints(kind)
    return kind(**{name: _restored(hints[name], value, device) for name, value in saved.items()})


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return saved_state(value)
    if isinstance(value, Mapping):
        return {_text(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _text(key: Any) -> Any:
    """A key that is a shape as text, 3x3."""
    return "x".join(map(str, key)) if isinstance(key, tuple) else key


def _restored(hint: Any, value: Any, device: torch.device | str) -> Any:
    """A saved value as the type that an annotation names."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if get_origin(hint) in (Union, UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if isinstance(value, Mapping):
        if is_dataclass(hint) and isinstance(hint, type):
            return restored_state(hint, value, device)
        key_hint, each_hint, *_ = (*get_args(hint), Any, Any)
        keys = [tuple(map(int, k.split("x"))) if get_origin(key_hint) is tuple else k for k in value]
        restored = (_restored(each_hint, each, device) for each in value.values())
        return dict(zip(keys, restored, strict=True))
    if isinstance(value, (list, tuple)):
        if hasattr(hint, "_fields"):  # a NamedTuple
            return hint(*map(_restored, get_type_hints(hint).values(), value, itertools.repeat(device)))
        each_hint = (*get_args(hint), Any)[0]
        return (get_origin(hint) or list)(_restored(each_hint, each, device) for each in value)
    return value
