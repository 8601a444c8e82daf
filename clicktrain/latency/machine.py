"""The machine that times are measured on, versions, and measurements on disk that belong to it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from clicktrain.errors import UserError
from clicktrain.files import cache_folder
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.kernels.native import toolchain


@dataclass(frozen=True, slots=True)
class Machine:
    """What times depend on beside the work: processor, GPU, PyTorch's threads in this process.

    ``lanes`` are fp32 numbers in a SIMD vector of generated kernels; 0 without a C compiler, and on a GPU.
    """

    cpu: str
    lanes: int
    threads: int
    gpu: str | None = None

    @classmethod
    def here(cls, device: torch.device | None = None) -> Machine:
        """The machine of this process, for work on a device (the CPU by default)."""
        gpu = None if device is None else gpu_name(device)
        tools = toolchain() if gpu is None else None
        return cls(cpu_name(), tools.lanes(torch.float32) if tools else 0, torch.get_num_threads(), gpu)


def cpu_name() -> str:
    """Name of the processor, as it reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu_name(device: torch.device) -> str | None:
    """Name of a device that is a GPU, else None."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple GPU" if device.type == "mps" else None


def describe(device: torch.device) -> dict[str, Any]:
    """The machine, its vector instructions, the C compiler and versions, for the record of a benchmark."""
    tools = toolchain()
    return {
        **asdict(Machine.here(device)),
        "isa": list(tools.isa) if tools else [],
        "compiler": tools.version if tools else None,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python, PyTorch and the packages that measurements depend on."""
    installed = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("clicktrain", "numpy", "safetensors"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    return installed


T = TypeVar("T")


def measured_once(
    kind: str,
    about: object,
    device: torch.device,
    read: Callable[[Mapping[str, Any]], T | None],
    measure: Callable[[], T],
    folder: Path | None = None,
) -> T:
    """A measurement from disk, or made now and kept there: a run that is repeated or resumed decides alike.

    Args:
        kind: first part of the file's name.
        about: JSON-able; the work that is measured and the version of its format. The rest of the name is a
            hash of it, of the machine and of PyTorch's version.
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
