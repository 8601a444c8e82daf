"""How a network was made: networks of `create_model` keep what they were called with, through copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_NAME = "_clicktrain_origin"


def origin_of(model: nn.Module) -> tuple[str, dict[str, Any] | None]:
    """Name of what builds the network, and the arguments of `create_model`; None if another code made it."""
    if _NAME in model.__dict__:
        name, arguments = model.__dict__[_NAME]
        return name, dict(arguments)
    kind = type(model)
    return f"{kind.__module__}:{kind.__qualname__}", None


def note_origin_(model: nn.Module, name: str, arguments: Mapping[str, Any]) -> None:
    """Keep what `create_model` was called with."""
    model.__dict__[_NAME] = (name, dict(arguments))
