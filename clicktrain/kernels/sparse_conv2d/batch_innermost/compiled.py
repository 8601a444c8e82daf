"""What Triton makes of a kernel for a GPU, read without having one: instructions, registers, shared memory.

Triton compiles for any target; its own ``cuobjdump`` says what the result takes of a multiprocessor. The
argument attributes are those that Triton finds at a call with aligned tensors and a batch that is a multiple
of 16.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from clicktrain.errors import UserError
from clicktrain.kernels.impls import Phase
from clicktrain.kernels.sparse_conv2d.batch_innermost import block_kernels, row_kernels
from clicktrain.kernels.sparse_conv2d.batch_innermost.tiles import (
    MULTIPROCESSORS,
    Tile,
    programs_at_once,
)

_TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_POINTERS = {
    "x": "", "v": "", "y": "", "gy": "", "residual": "", "scale": "fp32", "shift": "fp32", "sums": "fp32",
    "partial": "fp32", "offsets": "i32", "taps": "i32", "starts": "i32", "rows": "i32", "longest": "i32",
    "block_of": "i32", "row_of": "i32", "gx": "", "gr": "", "mean": "fp32", "slope": "fp32", "level": "fp32",
}  # fmt: skip
"""Arguments that are tensors, and what is in them; empty for the dtype of the activations."""
_DIVISIBLE = ("n", "size")
"""Numbers that are taken to be multiples of 16: images, and numbers of a channel."""
_INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma": r"(?<![.\w])mma\.sync",
    "fma": r"\bfma\.rn\.f(?:32|64)",
    "cp.async": r"\bcp\.async\.c[ag]",
    "vector loads": r"\bld\.global[\w.:]*\.v[248]\.",
}


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """One kernel for one target.

    Attributes:
        capability: of the GPU, two or three digits: 90 for Hopper.
        warps: of a program.
        registers: of a thread.
        shared: bytes of shared memory of a program.
        spilled: bytes of a thread that went into local memory.
        instructions: how often each kind stands in the PTX, by name; loads of ``cp.async`` bypass registers.
        programs: programs that fit on a multiprocessor at once.
    """

    capability: int
    warps: int
    registers: int
    shared: int
    spilled: int
    instructions: Mapping[str, int]
    programs: int

    @property
    def tensor_cores(self) -> bool:
        """Whether its products run there."""
        return any(self.instructions[name] for name in ("wgmma", "tcgen05", "mma"))


def function_of(phase: Phase, tile: Tile) -> Callable[..., None]:
    """The kernel that runs a phase as a tile says."""
    if tile.code == "blocks":
        return block_kernels.weight_gradient_blocks if phase == "wgrad" else block_kernels.convolve_blocks
    return row_kernels.weight_gradient_rows if phase == "wgrad" else row_kernels.convolve_rows


def constants_of(function: Callable[..., None]) -> list[str]:
    """Names of a kernel's constants: by convention those in capitals."""
    return [name for name in signature(function).parameters if name.isupper()]


def compile_for(
    phase: Phase,
    tile: Tile,
    dtype: torch.dtype,
    capability: int = 90,
    *,
    images: int | None = None,
    **flags: bool,
) -> CompiledKernel:
    """Compile a kernel for a compute capability and read the result.

    Args:
        images: of one position in a tile; all of its columns by default.
        flags: of the kernel, ``SUMS`` for one; those not named are false, but ``EVEN``.

    Raises:
        UserError: a capability that nothing is known about.
        Exception: Triton's own, for a tile that it cannot compile.
    """
    sizes = {"M": tile.m, "BQ": tile.bq, "BK": tile.bk, "BN": images or tile.bq}
    given = {**sizes, "PRECISION": tile.precision, "CACHED": tile.cached, "EVEN": True, **flags}
    return compile_function(
        function_of(phase, tile), dtype, given, capability, warps=tile.warps, stages=tile.stages
    )


def compile_function(
    function: Callable[..., None],
    dtype: torch.dtype,
    constants: Mapping[str, Any],
    capability: int = 90,
    *,
    warps: int = 4,
    stages: int = 2,
) -> CompiledKernel:
    """As `compile_for`, of any kernel; its constants that are not named are false, ``WIDE`` goes by dtype."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if capability not in MULTIPROCESSORS:
        known = ", ".join(map(str, MULTIPROCESSORS))
        raise UserError(f"a compute capability is one of {known}, not {capability}")
    given = {"WIDE": dtype is torch.float64, **constants}
    fixed = {name: given.get(name, False) for name in constants_of(function)}
    arguments = list(signature(function).parameters)
    types, attributes = {}, {}
    for place, name in enumerate(arguments):
        if name in fixed:
            types[name] = "constexpr"
        elif name in _POINTERS:
            inner = _POINTERS[name] or _TYPES[dtype]
            types[name] = f"*{'fp64' if inner == 'fp32' and dtype is torch.float64 else inner}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "i32"
            if name in _DIVISIBLE:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(JITFunction(function), types, fixed, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _resources(done.asm["cubin"])
    shared = int(done.metadata.shared)
    text = done.asm["ptx"]
    counts = {name: len(re.findall(pattern, text)) for name, pattern in _INSTRUCTIONS.items()}
    programs = programs_at_once(registers, shared, warps, MULTIPROCESSORS[capability])
    return CompiledKernel(capability, warps, registers, shared, spilled, counts, programs)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes that it keeps in local memory."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True, timeout=120
        )
    numbers: dict[str, Any] = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout))
    if set(numbers) != {"REG", "STACK", "LOCAL"}:
        raise UserError(f"{tool} does not say what a kernel takes: {done.stdout[:200]!r}")
    return int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"])
