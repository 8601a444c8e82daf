"""Measurements on disk: a run that is repeated or resumed reads what was measured, and decides alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from clicktrain.errors import UserError
from clicktrain.files import cache_folder
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.latency.machine import Machine

T = TypeVar("T")


def measured_once(
    kind: str,
    about: object,
    device: torch.device,
    read: Callable[[Mapping[str, Any]], T | None],
    measure: Callable[[], T],
    folder: Path | None = None,
) -> T:
    """A measurement from disk, or made now and kept there.

    Args:
        kind: first part of the file's name.
        about: JSON-able; the work that is measured and the version of its format. The rest of the name is a
            hash of it, of the machine and of PyTorch's version.
        device: where the work runs.
        read: the measurement in a file; None, or an error of missing or wrong values, measures again.
        measure: returns a dataclass.
        folder: ``$CLICKTRAIN_LATENCY_CACHE``, else ``clicktrain/latency`` in the user's cache, by default.
    """
    folder = folder or cache_folder("latency", "CLICKTRAIN_LATENCY_CACHE")
    if folder is None:
        return measure()
    cuda = torch.version.cuda if device.type == "cuda" else None
    text = json.dumps([asdict(Machine.here(device)), device.type, torch.__version__, cuda, about])
    path = folder / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    try:
        result = read(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        result = None
    if result is None:
        result = measure()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text_atomic(path, json.dumps(asdict(result)))  # type: ignore[call-overload]
        except (OSError, UserError):
            pass  # the next run measures again
    return result
