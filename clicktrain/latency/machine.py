"""The machine that times are measured on, and the versions of what they are measured with."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from clicktrain.kernels.native import toolchain


@dataclass(frozen=True, slots=True)
class Machine:
    """What times depend on beside the work.

    Attributes:
        cpu: name of the processor.
        lanes: fp32 numbers in a SIMD vector of generated kernels; 0 without a C compiler, and on a GPU.
        threads: PyTorch's, in this process.
        gpu: name of the GPU if the work runs on one.
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
