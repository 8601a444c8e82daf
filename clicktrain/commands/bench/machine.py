"""What a measurement was made on: it says nothing without that."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from clicktrain.kernels.native import toolchain
from clicktrain.latency.machine import Machine, versions
from clicktrain.train.device import resolve_device


def about(given: dict[str, Any]) -> dict[str, Any]:
    """The machine, its vector instructions, the C compiler, and versions of packages."""
    tools = toolchain()
    return {
        **asdict(Machine.here(resolve_device(given.get("device", "cpu")))),
        "isa": list(tools.isa) if tools else [],
        "compiler": tools.version if tools else None,
        "versions": versions(),
    }
