"""Checks of summary.json and of the facts in model.safetensors, before anything is computed from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from clicktrain.errors import UserError, shown
from clicktrain.files import parse_json
from clicktrain.limits import check_memory

Fits: TypeAlias = Callable[[Any], bool]
Checks: TypeAlias = Mapping[str, tuple[Fits, str]]
"""Key -> (whether a value fits, what is needed)."""

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
    _check(facts, _FACTS, f"{path} is damaged: its")
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


def check_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Raise a UserError that names the first wrong value, among those that commands compute with."""
    _check(summary, _SUMMARY, f"{path} is damaged: its")
    for row in summary["layers"]:
        _check(row, _LAYER, f"{path} is damaged: a layer's")


def _check(values: Any, checks: Checks, problem: str) -> None:
    for key, (fits, what) in checks.items():
        value = values.get(key)
        if not fits(value):
            raise UserError(f"{problem} {key} is {shown(value)}, {what} is needed")


def _between(low: int, high: int) -> Fits:
    return lambda value: type(value) is int and low <= value <= high


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(fits: Fits, length: int | None = None) -> Fits:
    return lambda value: isinstance(value, list) and length in (None, len(value)) and all(map(fits, value))


def _or_nothing(fits: Fits) -> Fits:
    return lambda value: value is None or fits(value)


_NUMBER, _COUNT = (_is_number, "a number"), (_between(0, 2**63), "a whole number")
_MAYBE_NUMBER = (_or_nothing(_is_number), "a number or nothing")
_TEXT = (_is_text, "a text")
_SUMMARY: Checks = {
    "method": _TEXT,
    "model": _TEXT,
    "val_accuracy": _MAYBE_NUMBER,
    "best_val_accuracy": _MAYBE_NUMBER,
    "compression_asked": _MAYBE_NUMBER,
    "sparsity_asked": (_or_nothing(lambda v: _is_number(v) and v < 1), "a share below 1 or nothing"),
    "compression_ratio": _NUMBER,
    "train_flops_ratio": _NUMBER,
    "total_train_flops_ratio": _MAYBE_NUMBER,
    "initial_train_flops": _MAYBE_NUMBER,
    "inference_flops_ratio": _NUMBER,
    "train_flops": _COUNT,
    "train_seconds": _NUMBER,
    "parameters": _COUNT,
    "nonzero_parameters": _COUNT,
    "layers": (_is_list(lambda row: isinstance(row, dict)), "a list of records"),
}
_LAYER: Checks = {
    "name": _TEXT,
    "shape": (lambda v: _is_list(_between(1, 2**63))(v) and len(v) > 0, "a list of sizes"),
    "density": _NUMBER,
    "nnz_per_filter": (_or_nothing(_between(0, 2**63)), "a whole number or nothing"),
    "forward_flops": _COUNT,
    "forward_flops_dense": _COUNT,
}
_FACTS: Checks = {
    "model": (_is_text, "a name"),
    "width": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "stem": (_is_text, "a name"),
    "num_classes": (_between(1, MOST_CLASSES), "a number of classes"),
    "in_channels": (_between(1, LARGEST_SIDE), "a number of channels"),
    "image_shape": (_is_list(_between(1, LARGEST_SIDE), 3), "[channels, height, width]"),
    "classes": (_is_list(_is_text), "a list of names"),
    "mean": (_is_list(_is_number), "a list of numbers"),
    "std": (_is_list(lambda v: _is_number(v) and v > 0), "a list of numbers above 0"),
    "value_range": (_or_nothing(_is_list(_is_number, 2)), "[low, high] or nothing"),
}
