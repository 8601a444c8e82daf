"""What model.safetensors says of its network, checked before anything is built from it. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clicktrain.errors import UserError, shown
from clicktrain.files import parse_json
from clicktrain.limits import check_memory

MOST_CLASSES = 10_000_000
LARGEST_SIDE = 65_536
"""Pixels."""


def parse_facts(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The facts in the metadata of a file, unchecked; {} if it holds none, UserError if they are damaged."""
    facts = parse_json(metadata.get("clicktrain", "{}"), f"{path} is damaged: its facts are not JSON")
    if not isinstance(facts, dict):
        raise UserError(f"{path} is damaged: its facts are {shown(facts)}, not a mapping")
    return facts


def read_facts(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The facts (see `clicktrain.train.Prepared`) in the metadata of ``model.safetensors``.

    Raises:
        UserError: they are missing, of wrong types, do not fit each other, or ask for more memory than the
            machine has.
    """
    if "clicktrain" not in metadata:
        raise UserError(f"{path} is not the network of a run: it does not say how to build it")
    facts = parse_facts(metadata, path)
    for name, (fits, what) in _CHECKS.items():
        if not fits(facts.get(name)):
            raise UserError(
                f"{path} is damaged: it says {name} {shown(facts.get(name))}, where {what} is needed"
            )
    channels, height, width = facts["image_shape"]
    together = (
        ("classes", len(facts["classes"]), "num_classes", facts["num_classes"]),
        ("image_shape", channels, "in_channels", facts["in_channels"]),
        ("mean", len(facts["mean"]), "in_channels", channels),
        ("std", len(facts["std"]), "in_channels", channels),
    )
    for name, count, other, expected in together:
        if count != expected:
            raise UserError(f"{path} is damaged: its {name} is of {count}, its {other} is {expected}")
    check_memory(
        4 * channels * height * width, f"an image of {path} ({height}x{width})", "get the file again"
    )
    return facts


def _is_count(most: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and 1 <= value <= most


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(fits: Callable[[object], bool], length: int | None = None) -> Callable[[object], bool]:
    return lambda value: (
        isinstance(value, list) and length in (None, len(value)) and all(fits(item) for item in value)
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str)


_CHECKS: dict[str, tuple[Callable[[object], bool], str]] = {
    "model": (_is_text, "a name"),
    "width": (lambda value: _is_number(value) and value > 0, "a number above 0"),  # type: ignore[operator]
    "stem": (_is_text, "a name"),
    "num_classes": (_is_count(MOST_CLASSES), "a number of classes"),
    "in_channels": (_is_count(LARGEST_SIDE), "a number of channels"),
    "image_shape": (_is_list(_is_count(LARGEST_SIDE), 3), "[channels, height, width]"),
    "classes": (_is_list(_is_text), "a list of names"),
    "mean": (_is_list(_is_number), "a list of numbers"),
    "std": (_is_list(lambda v: _is_number(v) and v > 0), "a list of numbers above 0"),  # type: ignore[operator]
    "value_range": (
        lambda value: value is None or _is_list(_is_number, 2)(value),
        "[low, high] or nothing",
    ),
}
