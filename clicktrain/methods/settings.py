"""Checks of settings that methods share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clicktrain.errors import UserError


def check_choices(settings: Any, choices: Mapping[str, tuple[str, ...]]) -> None:
    """UserError unless each of these settings is one of the words that it may be."""
    for key, words in choices.items():
        if getattr(settings, key) not in words:
            raise UserError(f"{key} must be one of {', '.join(words)}, not {getattr(settings, key)!r}")


def keep_as_tuples(settings: Any, *names: str) -> None:
    """Lists, as they come from YAML, become tuples: a frozen dataclass can be compared and hashed."""
    for name in names:
        object.__setattr__(settings, name, tuple(getattr(settings, name)))
