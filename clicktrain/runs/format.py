"""Reads and checks the text files of a run's folder: version, logs, summary, robustness."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from clicktrain.errors import UserError, shown
from clicktrain.files import (
    LARGEST_TEXT,
    LARGEST_YAML,
    is_file,
    parse_json,
    read_json,
    read_regular,
    read_text,
)
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.limits import check_memory

FORMAT_VERSION = 4
"""Version of the folder, its checkpoints and its summary: only this one is read."""

HEADER = "# clicktrain run folder, format "
"""Start of the first line of config.yaml; the version follows."""


def check_folder(folder: Path) -> None:
    """Raise a UserError unless this is the folder of a run of this `FORMAT_VERSION`."""
    config = folder / "config.yaml"
    if not is_file(config):
        raise UserError(f"{folder} is not the folder of a run: it has no config.yaml")
    first = read_text(config, LARGEST_YAML).split("\n", 1)[0]
    if not first.startswith(HEADER):
        return
    version = first.removeprefix(HEADER).strip()
    if not version.isdecimal() or len(version) > 9:
        raise UserError(f"{config} is damaged: its first line names the format {shown(version, 20)}")
    check_version(int(version), folder)


def is_settings_of_run(path: str | Path) -> bool:
    """Whether a file of settings was written by a run, with all of them spelled out."""
    return is_file(Path(path)) and read_text(Path(path), LARGEST_YAML).startswith(HEADER)


def check_version(version: int, path: Path) -> None:
    """Raise a `UserError` unless this is the `FORMAT_VERSION`; ``path`` is what has it."""
    if version != FORMAT_VERSION:
        remedy = (
            "update clicktrain" if version > FORMAT_VERSION else "start the run again, or use an older one"
        )
        raise UserError(
            f"{path} has format {version}, this version of clicktrain reads format {FORMAT_VERSION}: {remedy}"
        )


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file, in order; an unfinished last line is left out, a missing file has none."""
    if not is_file(path):
        return []
    lines = read_regular(path, LARGEST_TEXT).split(b"\n")[:-1]  # what follows the last newline is unfinished
    problem = f"{path} is damaged: a line of it is not JSON"
    records = [parse_json(line, problem) for line in lines if line.strip()]
    if not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path} is damaged: a line of it is not a record")
    return records


def read_summary(path: Path) -> dict[str, Any] | None:
    """summary.json, or None while there is none; UserError if it is damaged or of another version."""
    if not is_file(path):
        return None
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it is {shown(values)}, not a record")
    version = values.get("format_version", 0)
    if not _between(-(2**63), 2**63)(version):
        raise UserError(
            f"{path} is damaged: its format_version is {shown(version)}, a whole number is needed"
        )
    check_version(version, path)
    return values


def read_robustness(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Attack -> (epsilon, accuracy in percent), rising, from robustness.json; empty while there is none."""
    if not is_file(path):
        return {}
    try:
        curves = {
            str(name): sorted((float(row["epsilon"]), float(row["accuracy"])) for row in rows)
            for name, rows in read_json(path)["attacks"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: make it again with 'clicktrain evaluate'") from None
    return {name: points for name, points in curves.items() if points}


def write_robustness(path: Path, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Add curves to robustness.json; those of other attacks stay, unless the file is damaged.

    ``{"attacks": {"fgsm": [{"epsilon": 0.05, "accuracy": 40.4}, ...]}}``, accuracy in percent.
    """
    try:
        known = read_robustness(path)
    except UserError:
        known = {}
    attacks = {
        name: [{"epsilon": epsilon, "accuracy": accuracy} for epsilon, accuracy in points]
        for name, points in {**known, **curves}.items()
    }
    write_text_atomic(path, json.dumps({"attacks": attacks}, indent=2) + "\n")


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

    UserError if they are missing, of wrong types, do not fit each other, or need more memory than there is.
    """
    if "clicktrain" not in metadata:
        raise UserError(f"{path} is not the network of a run: it does not say how to build it")
    facts = parse_facts(metadata, path)
    for name, (fits, what) in _FACTS.items():
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
    "test_accuracy": _MAYBE_NUMBER,
    "compression_asked": _MAYBE_NUMBER,
    "sparsity_asked": (_or_nothing(lambda v: _is_number(v) and v < 1), "a share below 1 or nothing"),
    "compression_ratio": _NUMBER,
    "train_flops_ratio": _NUMBER,
    "train_flops_ratio_nominal": _MAYBE_NUMBER,
    "total_train_flops_ratio": _MAYBE_NUMBER,
    "initial_train_flops": _MAYBE_NUMBER,
    "inference_flops_ratio": _NUMBER,
    "train_flops": _COUNT,
    "train_seconds": _NUMBER,
    "initial_train_seconds": _MAYBE_NUMBER,
    "total_train_seconds": _MAYBE_NUMBER,
    "parameters": _COUNT,
    "nonzero_parameters": _COUNT,
    "dense_parameters": (_or_nothing(_between(0, 2**63)), "a whole number or nothing"),
    "file_bytes": (
        _or_nothing(lambda v: isinstance(v, dict) and all(map(_between(0, 2**63), v.values()))),
        "sizes by file or nothing",
    ),
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
