"""The system's C compiler: which, what it can do on this processor, and with which flags it is called."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from clicktrain.kernels.native.vector import compute_type

_FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast")
_TUNE = (("-march=native",), ("-mcpu=native",), ())
_VECTOR_BYTES = (("__AVX512F__", 64), ("__AVX__", 32))
_ISA_MACROS = ("__AVX512F__", "__AVX512BF16__", "__AVX2__", "__AVX__", "__FMA__", "__ARM_NEON", "__SSE2__")


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A C compiler that has been tried on this machine.

    Attributes:
        compiler: path of the executable.
        version: the first line of what it says of itself.
        flags: what every library is built with.
        isa: macros of the processor's vector instructions that the compiler will use, e.g. ``__AVX2__``.
        vector_bytes: width of one vector register.
        openmp: whether threads can be used.
    """

    compiler: str
    version: str
    flags: tuple[str, ...]
    isa: tuple[str, ...]
    vector_bytes: int
    openmp: bool

    @property
    def registers(self) -> int:
        """Vector registers that code can use."""
        return 32 if "__AVX512F__" in self.isa or "__ARM_NEON" in self.isa else 16

    @property
    def multiplies_pairs(self) -> bool:
        """Whether the processor multiplies pairs of bfloat16 numbers in whole registers (``vdpbf16ps``)."""
        return "__AVX512BF16__" in self.isa and self.vector_bytes == 64

    def lanes(self, dtype: torch.dtype) -> int:
        """V: images that lie side by side where activations are kept in that type.

        As many as a vector register has numbers of the type that is computed in.
        """
        return self.vector_bytes // compute_type(dtype).itemsize


@functools.cache
def toolchain() -> Toolchain | None:
    """The compiler of this machine: ``$CC``, else cc, gcc or clang; None if none of them works.

    ``CLICKTRAIN_CFLAGS`` adds flags (a sanitizer, say); they are part of the cache's key.
    """
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        path = shutil.which(name) if name else None
        if path is not None and (found := _try(path)) is not None:
            return found
    return None


def needed_toolchain() -> Toolchain:
    """`toolchain`, where nothing goes without it; RuntimeError if there is none."""
    tools = toolchain()
    if tools is None:
        raise RuntimeError("there is no C compiler: install gcc or clang, or name one in CC")
    return tools


def _try(compiler: str) -> Toolchain | None:
    extra = tuple(os.environ.get("CLICKTRAIN_CFLAGS", "").split())
    for tune in _TUNE:
        for openmp in (("-fopenmp",), ()):
            flags = (*_FLAGS, *tune, *openmp, *extra)
            if _compiles(compiler, flags):
                macros = _macros(compiler, (*tune, *extra))
                width = next((size for macro, size in _VECTOR_BYTES if macro in macros), 16)
                isa = tuple(macro for macro in _ISA_MACROS if macro in macros)
                return Toolchain(compiler, _version(compiler), flags, isa, width, bool(openmp))
    return None


def _compiles(compiler: str, flags: tuple[str, ...]) -> bool:
    with tempfile.TemporaryDirectory(prefix="clicktrain-") as folder:
        source = Path(folder) / "try.c"
        source.write_text("int answer(void) { return 42; }\n")
        command = [compiler, *flags, str(source), "-o", str(Path(folder) / "try.so")]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _macros(compiler: str, flags: tuple[str, ...]) -> frozenset[str]:
    command = [compiler, *flags, "-dM", "-E", "-x", "c", os.devnull]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return frozenset(line.split()[1] for line in text.splitlines() if line.startswith("#define "))


def _version(compiler: str) -> str:
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return text.splitlines()[0] if text else compiler
