"""Checks of values in a plan that comes from a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MOST = 1 << 31
"""Sizes in plans are below it: more than any tensor has in one dimension."""


def fields(value: Any, what: str) -> Mapping[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} is an object, not {_short(value)}")
    return value


def entries(value: Any, what: str) -> list[Any]:
    """A JSON array."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{what} is a list, not {_short(value)}")
    return list(value)


def text(value: Any, what: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is a text, not {_short(value)}")
    return value


def whole(value: Any, what: str, least: int = 0) -> int:
    """An integer from ``least`` to `MOST`."""
    if type(value) is not int or not least <= value < MOST:
        raise ValueError(f"{what} is a whole number of at least {least}, not {_short(value)}")
    return value


def sizes(value: Any, what: str) -> tuple[int, ...]:
    """Integers of at least 1."""
    return tuple(whole(one, what, 1) for one in entries(value, what))


def milliseconds(value: Any, what: str) -> float | None:
    """A finite number that is not negative, or None."""
    if value is not None and not (type(value) in (int, float) and 0 <= value < math.inf):
        raise ValueError(f"{what} is a number of milliseconds, not {_short(value)}")
    return None if value is None else float(value)


def share(value: Any, what: str) -> float:
    """A number from 0 to 1."""
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ValueError(f"{what} is a number from 0 to 1, not {_short(value)}")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
