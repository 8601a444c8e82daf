"""Kernels that blocked regions need beside their convolutions: conversions, batch norm, max pooling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from clicktrain.compiler.units import Unit, max_pooling
from clicktrain.kernels.batch_norm2d import launch as batch_norm
from clicktrain.kernels.blocked_layout import codegen as layout
from clicktrain.kernels.max_pool2d import launch as max_pool
from clicktrain.kernels.native import KernelError, needed_toolchain
from clicktrain.kernels.native.library import build_all

Pass = Literal["layout", "batch_norm", "max_pool"]
_SOURCES = {"layout": layout.source, "batch_norm": batch_norm.source, "max_pool": max_pool.source}


def pass_of(unit: Unit) -> Pass | None:
    """The pass that runs a unit in the blocked layout; None for a convolution, and for what PyTorch runs."""
    if unit.kind == "batch_norm":
        return "batch_norm"
    return "max_pool" if unit.kind == "pool" and max_pooling(unit) is not None else None


def pass_text(name: Pass, dtype: torch.dtype) -> str:
    """Its C text for activations of a dtype."""
    return _SOURCES[name](dtype, needed_toolchain().lanes(dtype))


def broken_passes(
    units: Sequence[Unit], dtypes: Iterable[torch.dtype]
) -> dict[tuple[Pass, torch.dtype], KernelError]:
    """Build the passes that units need, and conversions; those that cannot be built, and why."""
    found: set[Pass | None] = {"layout", *map(pass_of, units)}
    names: list[Pass] = sorted(name for name in found if name is not None)
    texts = {(name, dtype): pass_text(name, dtype) for name in names for dtype in dict.fromkeys(dtypes)}
    failed = build_all(texts.values())
    return {key: failed[text] for key, text in texts.items() if text in failed}
