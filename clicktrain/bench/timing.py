"""Shared by the benchmarks: medians of interleaved calls, precision and memory format, rows as JSON."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.kernels.native import missing_toolchain, toolchain
from clicktrain.latency.timer import check_rounds as check_rounds
from clicktrain.latency.timer import median_ms as median_ms

Progress = Callable[[str], None]
"""Called with what is being measured."""


def need_compiler() -> None:
    """Raise UserError unless kernels can be built."""
    if toolchain() is None:
        raise UserError(f"the sparse kernels cannot be built: {missing_toolchain()}")


class WrongResultError(RuntimeError):
    """The code to be timed computes something wrong, so its time would mean nothing."""


def fastest(times: Mapping[str, float]) -> tuple[str, float]:
    """The name with the smallest time, and that time."""
    name = min(times, key=lambda one: times[one])
    return name, times[name]


def autocast(bf16: bool) -> contextlib.AbstractContextManager[object]:
    """bfloat16 autocast on the CPU, or nothing."""
    return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()


def channels_last(model: nn.Module, *tensors: Tensor) -> tuple[Any, ...]:
    """A network, itself, and its images in channels_last; inputs without height and width as they are."""
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = (t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors)
    return model, *images


def to_json(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Dataclass rows as JSON-able dicts."""
    return [asdict(row) for row in rows]
