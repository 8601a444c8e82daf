"""Checks of values in a plan that comes from a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MOST = 1 << 31
"""Sizes in plans are below it: more than any tensor has in one dimension."""


def fields(value: Any, what: str) -> Mapping[str, Any]:
    """A JSON object."""
    _check(isinstance(value, dict), value, f"{what} is an object")
    return value  # type: ignore[no-any-return]


def entries(value: Any, what: str) -> list[Any]:
    """A JSON array."""
    _check(isinstance(value, (list, tuple)), value, f"{what} is a list")
    return list(value)


def text(value: Any, what: str) -> str:
    """A string."""
    _check(isinstance(value, str), value, f"{what} is a text")
    return str(value)


def whole(value: Any, what: str, least: int = 0) -> int:
    """An integer from ``least`` to `MOST`."""
    right = type(value) is int and least <= value < MOST
    _check(right, value, f"{what} is a whole number of at least {least}")
    return int(value)


def sizes(value: Any, what: str) -> tuple[int, ...]:
    """Integers of at least 1."""
    return tuple(whole(one, what, 1) for one in entries(value, what))


def milliseconds(value: Any, what: str) -> float | None:
    """A finite number that is not negative, or None."""
    right = value is None or (type(value) in (int, float) and 0 <= value < math.inf)
    _check(right, value, f"{what} is a number of milliseconds")
    return None if value is None else float(value)


def share(value: Any, what: str) -> float:
    """A number from 0 to 1."""
    _check(type(value) in (int, float) and 0 <= value <= 1, value, f"{what} is a number from 0 to 1")
    return float(value)


def _check(right: bool, value: Any, wanted: str) -> None:
    if not right:
        text = repr(value)
        raise ValueError(f"{wanted}, not {text if len(text) <= 60 else f'{text[:57]}...'}")
