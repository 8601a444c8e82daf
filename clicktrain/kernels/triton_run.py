"""Run a kernel in Triton's language: compiled on a GPU, interpreted on the CPU where that is asked for.

On a GPU Triton compiles a kernel when it is first called, and keeps it on disk (``TRITON_CACHE_DIR``). On the
CPU its interpreter runs the same functions, slowly, where ``TRITON_INTERPRET=1`` says so: for tests.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from clicktrain.kernels.native import KernelError


def missing_triton() -> str | None:
    """Why Triton cannot be used, as a clause; None where it can."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def _compiled(function: Callable[..., None], interpret: bool) -> Any:
    if interpret:
        from triton.runtime.interpreter import InterpretedFunction

        return InterpretedFunction(function)
    import triton

    return triton.jit(function)


def run_kernel(
    function: Callable[..., None],
    grid: tuple[int, ...],
    device: torch.device,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    *,
    warps: int = 4,
    stages: int = 2,
    cut: object = "",
) -> None:
    """Call a kernel on a grid of programs; ``cut`` says in messages how it is cut.

    Raises:
        KernelError: Triton cannot build it, or it does not fit; what PyTorch raises is the caller's.
    """
    if device.type == "cpu":
        _compiled(function, True)[grid](*arguments, **constants)
        return
    try:
        with torch.cuda.device(device):
            _compiled(function, False)[grid](*arguments, **constants, num_warps=warps, num_stages=stages)
    except Exception as error:
        if not type(error).__module__.startswith("triton") and "PassManager" not in str(error):
            raise
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise KernelError(
            f"Triton cannot build {function.__name__} for {cut}: {cause}", str(error)
        ) from error
