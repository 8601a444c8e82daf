"""What a measurement was made on: it says nothing without that."""

from __future__ import annotations

from typing import Any

import torch

from clicktrain.kernels.native import toolchain
from clicktrain.latency.machine import cpu_name, gpu_name, versions
from clicktrain.train.device import resolve_device


def about(given: dict[str, Any]) -> dict[str, Any]:
    """The processor, its instructions, the compiler, threads and versions."""
    tools = toolchain()
    return {
        "cpu": cpu_name(),
        "gpu": gpu_name(resolve_device(given.get("device", "cpu"))),
        "threads": torch.get_num_threads(),
        "isa": list(tools.isa) if tools else [],
        "compiler": tools.version if tools else None,
        "versions": versions(),
    }
