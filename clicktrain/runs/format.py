"""Reads and checks the text files of a run's folder: version, logs, summary, robustness."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    """Records of a JSONL file, in order; an unfinished last line is left out, a missing file has none.

    Raises:
        UserError: a line that is not JSON, or not a mapping.
    """
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
    if not _is_whole(version):
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


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
