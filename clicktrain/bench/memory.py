"""Peak memory of training steps, as the system counts it, in a process that does nothing else.

What a profiler of PyTorch's allocator sees leaves out what kernels and libraries allocate themselves, so the
process is asked instead: its resident memory at the highest point of a step, less what the interpreter and
the libraries take before there is a model.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_ENVIRONMENT = {
    # Freed blocks return to the system at once, so that resident memory is memory in use.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "CLICKTRAIN_KEEP_MEMORY": "0",
}


def in_fresh_process(module: str, argument: dict[str, Any]) -> float:
    """Run ``python -m module JSON`` and return the number that it prints last; RuntimeError if it fails."""
    return output_of_fresh_process(module, argument)


def output_of_fresh_process(
    module: str, argument: dict[str, Any], variables: Mapping[str, str] | None = None, *, lean: bool = True
) -> float:
    """The same, with more environment variables; ``lean``: freed memory goes back to the system at once."""
    own = {**(_ENVIRONMENT if lean else {}), **(variables or {})}
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", module, json.dumps(argument)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **own, "PYTHONPATH": path},
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring in a process of its own failed: {done.stderr.strip()[-2000:]}")
    return float(done.stdout.split()[-1])


def peak_mb(prepare: Callable[[], Callable[[], object]], steps: int = 2) -> float:
    """Megabytes that a step needs beyond an empty process, at its highest point.

    ``prepare`` makes everything and returns the step; one step is done uncounted, so that what is made once
    (optimizer state, generated code) is there.
    """
    empty = _resident_kb("VmRSS")
    step = prepare()
    step()
    gc.collect()
    _release()
    for _ in range(steps):
        step()
    return (_resident_kb("VmHWM") - empty) / 1024


def _release() -> None:
    """Give freed memory back, and forget the highest point so far (without Linux's /proc it stays)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def _resident_kb(name: str) -> float:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return float(line.split()[1])
    except OSError:
        pass
    import resource  # not above: Windows has none

    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest / 1024 if sys.platform == "darwin" else float(highest)
