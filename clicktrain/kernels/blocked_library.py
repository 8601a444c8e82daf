"""What all kernels on ``[N/V, C, H, W, V]`` share: libraries by dtype, checks and alignment of the input.

V images lie side by side in the innermost dimension. A batch that is no multiple of V has padding lanes. What
they hold in activations is never read; in gradients they are zero, so that sums need no case of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.kernels.native import STORED_TYPES, Library, load, needed_toolchain

ALIGNMENT = 64
"""Bytes. Callers in a training step test it themselves before they call `vectors`."""


@functools.cache
def library_for(source: Callable[[torch.dtype, int], str], dtype: torch.dtype) -> Library:
    """The compiled functions of ``source(dtype, lanes)``; a KernelError if there is no compiler."""
    return load(source(dtype, needed_toolchain().lanes(dtype)))


def check_dtype(dtype: torch.dtype, what: str) -> None:
    """Refuse activations of a dtype without kernels; ``what`` is the operator, for the message."""
    if dtype not in STORED_TYPES:
        names = ", ".join(str(one).removeprefix("torch.") for one in STORED_TYPES)
        raise UserError(f"{what} is for activations of one of {names}, not of {dtype}: convert the input")


def check_blocked(shape: torch.Size, dtype: torch.dtype, device: torch.device, what: str) -> None:
    """Refuse, with a UserError, what generated code would misread: it takes pointers to [B, C, H, W, V]."""
    check_dtype(dtype, what)
    lanes = needed_toolchain().lanes(dtype)
    if len(shape) != 5 or shape[4] != lanes:
        raise UserError(
            f"{what} takes [B, C, H, W, {lanes}] of {dtype} here, not {list(shape)}: convert with block_batch"
        )
    if device.type != "cpu":
        raise UserError(f"{what} is for CPUs, not for {device}")


def vectors(x: Tensor) -> Tensor:
    """Return the tensor itself, or a copy that is contiguous and aligned to a SIMD vector."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone(memory_format=torch.contiguous_format)
