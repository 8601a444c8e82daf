"""Checks sizes from outside against the machine's memory before memory is allocated."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from clicktrain.errors import UserError

if TYPE_CHECKING:
    import torch

_FALLBACK = 64 * 2**30
_CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def machine_bytes() -> int:
    """Memory that this process may take: the machine's, or the limit of its container if that is lower."""
    total = _FALLBACK
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows has no sysconf
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP:
        with contextlib.suppress(OSError, ValueError):  # no control group, or "max"
            return min(total, int(path.read_text()))
    return total


def device_bytes(device: torch.device | None) -> int:
    """Memory of the device: a GPU's own, else `machine_bytes`."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return machine_bytes()


def check_memory(needed_bytes: float, what: str, remedy: str, device: torch.device | None = None) -> None:
    """Raise a UserError, with the estimate and the limit, unless the bytes fit the machine or the device.

    ``what`` takes the memory, as the subject of the sentence; ``remedy`` would help, an imperative.
    """
    limit = device_bytes(device)
    if not needed_bytes <= limit:
        kind = "GPU" if device is not None and device.type == "cuda" else "machine"
        needed = in_words(needed_bytes)
        raise UserError(f"{what} would take about {needed} and this {kind} has {in_words(limit)}: {remedy}")


def in_words(num_bytes: float) -> str:
    """3.4 GiB, 812 MiB, 1.2e+03 PiB."""
    for size, unit in ((2**50, "PiB"), (2**40, "TiB"), (2**30, "GiB")):
        if num_bytes >= size:
            return f"{num_bytes / size:{'.2g' if num_bytes < 10 * size else '.0f'}} {unit}"
    return f"{num_bytes / 2**20:.0f} MiB"
