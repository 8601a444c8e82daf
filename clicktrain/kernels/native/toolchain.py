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

from clicktrain.kernels.native.simd import Simd, native_simd, requested_simd
from clicktrain.kernels.native.vector import compute_type

_FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast")
_TUNE = (("-march=native",), ("-mcpu=native",), ())
_ISA_MACROS = ("__AVX512F__", "__AVX512BF16__", "__AVX2__", "__AVX__", "__FMA__", "__ARM_NEON", "__SSE2__")


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A C compiler that has been tried on this machine.

    Attributes:
        compiler: path of the executable.
        version: the first line of what it says of itself.
        flags: what every library is built with.
        isa: macros of the processor's vector instructions that the compiler will use, e.g. ``__AVX2__``.
        simd: what kernels are generated for; the processor's own unless the environment says otherwise.
        openmp: whether threads can be used.
    """

    compiler: str
    version: str
    flags: tuple[str, ...]
    isa: tuple[str, ...]
    simd: Simd
    openmp: bool

    @property
    def registers(self) -> int:
        """Vector registers that code can use."""
        return self.simd.registers

    @property
    def multiplies_pairs(self) -> bool:
        """Whether pairs of bfloat16 numbers are multiplied in whole registers (``vdpbf16ps``)."""
        return self.simd.pairs

    @property
    def identity(self) -> tuple[str, ...]:
        """All that decides which kernels are built, and how fast they are: part of the keys of caches."""
        return (self.version, *self.flags, *self.isa, str(self.simd))

    def lanes(self, dtype: torch.dtype) -> int:
        """V: images that lie side by side where activations are kept in that type.

        As many as a vector register has numbers of the type that is computed in.
        """
        return self.simd.vector_bytes // compute_type(dtype).itemsize


@functools.cache
def toolchain() -> Toolchain | None:
    """The compiler of this machine: ``$CC``, else cc, gcc or clang; None if none of them works.

    ``CLICKTRAIN_CFLAGS`` adds flags (a sanitizer, say); they are part of the cache's key. So are
    ``CLICKTRAIN_LANES`` and ``CLICKTRAIN_PAIRS``, which set the width of vectors: see `requested_simd`. A
    process reads all of them once.
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
                isa = tuple(macro for macro in _ISA_MACROS if macro in macros)
                simd = requested_simd(native_simd(isa))
                return Toolchain(compiler, _version(compiler), flags, isa, simd, bool(openmp))
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
