"""Measurements on disk: a run that is repeated or resumed reads what was measured, and decides alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from clicktrain.errors import UserError
from clicktrain.files import cache_folder
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.latency.machine import Machine


def table_path(kind: str, about: object, device: torch.device, folder: Path | None = None) -> Path | None:
    """Where a measurement is kept: its name is a hash of what it depends on.

    Args:
        kind: first part of the name.
        about: JSON-able; the work that is measured and the version of its format.
        device: where it runs; the machine and PyTorch's version are part of the hash too.
        folder: ``$CLICKTRAIN_LATENCY_CACHE``, else ``clicktrain/latency`` in the user's cache, by default.

    Returns:
        None where the user has no folder for caches.
    """
    folder = folder or cache_folder("latency", "CLICKTRAIN_LATENCY_CACHE")
    cuda = torch.version.cuda if device.type == "cuda" else None
    text = json.dumps([asdict(Machine.here(device)), device.type, torch.__version__, cuda, about])
    name = f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    return None if folder is None else folder / name


def read_table(path: Path | None) -> Mapping[str, object] | None:
    """The measurement at a path; None if there is none that can be read."""
    try:
        document = None if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def keep_table(path: Path | None, document: Mapping[str, object]) -> None:
    """Write a measurement; where that is not possible, the next run measures again."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps(document))
    except (OSError, UserError):
        return
