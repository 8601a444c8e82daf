"""The system's C compiler, its flags, and what it can do on this processor."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from clicktrain.kernels.native.command import (
    SELF_TEST,
    Finished,
    compile_seconds,
    run_limited,
    why_unfit,
    with_identity,
)
from clicktrain.kernels.native.failure import KernelError
from clicktrain.kernels.native.folder import cache_folder, is_full, unwritable, work_folder
from clicktrain.kernels.native.sealed import key_of
from clicktrain.kernels.native.simd import Simd, native_simd, requested_simd
from clicktrain.kernels.native.source import compute_type

_FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-shared", "-fno-math-errno", "-ffp-contract=fast")
_TUNE = (("-march=native",), ("-mcpu=native",), ())
_SELF_TEST_KEY = key_of(SELF_TEST)
_HELP = "install gcc or clang, or name a compiler that works in CC"
NO_COMPILER = "there is no C compiler: install gcc or clang, or name one in CC"
_ISA_MACROS = ("__AVX512F__", "__AVX512BF16__", "__AVX2__", "__AVX__", "__FMA__", "__ARM_NEON", "__SSE2__")


@dataclass(frozen=True, slots=True)
class Toolchain:
    """A C compiler that has been tried on this machine.

    Attributes:
        version: the first line of what it says of itself.
        flags: what every library is built with.
        isa: macros of the processor's vector instructions that the compiler will use, e.g. ``__AVX2__``.
        simd: what kernels are generated for; the processor's own unless the environment says otherwise.
        openmp: whether threads can be used.
        arguments: what ``$CC`` has behind the executable (``ccache gcc``, ``gcc -m64``).
    """

    compiler: str
    version: str
    flags: tuple[str, ...]
    isa: tuple[str, ...]
    simd: Simd
    openmp: bool
    arguments: tuple[str, ...] = ()

    @property
    def identity(self) -> tuple[str, ...]:
        """All that decides which kernels are built, and how fast they are: part of the keys of caches."""
        program = os.path.realpath(self.compiler)
        return (program, *self.arguments, self.version, *self.flags, *self.isa, str(self.simd))

    @property
    def name(self) -> str:
        """How it is called."""
        return " ".join((self.compiler, *self.arguments))

    def command(self, source: Path, product: Path) -> list[str]:
        """What builds a library of a text."""
        return [self.compiler, *self.arguments, *self.flags, str(source), "-o", str(product), "-lm"]

    def build(self, source: str, key: str, work: Path, self_test: bool = False) -> tuple[Path, Finished, str]:
        """Compile a text and load the library in another process.

        Returns:
            The library, how the compiler ended, and what is wrong with the library, as a predicate.
        """
        name = "try" if self_test else "kernel"
        text, product = work / f"{name}.c", work / f"{name}.so"
        try:
            text.write_text(with_identity(source, key), encoding="utf-8")
        except OSError as error:
            raise unwritable(work.parent, error) from error
        done, why = run_limited(self.command(text, product), compile_seconds(), work), ""
        if done.problem and not done.hung and is_full(work, done.output):
            raise unwritable(work.parent)
        if not done.problem:
            exists = product.is_file()
            why = why_unfit(product, key, work, self_test) if exists else "writes no library"
        return product, done, why

    def lanes(self, dtype: torch.dtype) -> int:
        """V: images that lie side by side where activations are kept in that type.

        As many as a vector register has numbers of the type that is computed in.
        """
        return self.simd.vector_bytes // compute_type(dtype).itemsize


@functools.cache
def _search() -> tuple[Toolchain | None, str]:
    try:
        return _find(cache_folder())
    except KernelError as error:
        return None, str(error)


def _find(folder: Path) -> tuple[Toolchain | None, str]:
    named = os.environ.get("CC", "").strip()
    try:
        candidates = [shlex.split(named)] if named else [["cc"], ["gcc"], ["clang"]]
    except ValueError:
        return None, f"CC={named!r} cannot be read (a quotation is not closed): {_HELP}"
    reasons = []
    for program, *arguments in candidates:
        path = shutil.which(program)
        if path is not None:
            result = _try(path, arguments, folder)
            if isinstance(result, Toolchain):
                return result, ""
            reasons.append(f"the C compiler {' '.join((program, *arguments))} {result}")
    if reasons:
        return None, f"{reasons[0]}: {_HELP}"
    if named:
        return None, f"CC={named!r} names a program that does not exist: {_HELP}"
    return None, NO_COMPILER


def toolchain() -> Toolchain | None:
    """The compiler of this machine: ``$CC`` alone if it is set, else cc, gcc or clang; None if none works.

    A compiler works if a library that it builds passes a self-test, in another process. It is looked for
    once per process. ``CLICKTRAIN_CFLAGS`` adds flags (a sanitizer, say); they are part of the cache's key.
    So are ``CLICKTRAIN_LANES`` and ``CLICKTRAIN_PAIRS``, which set the width of vectors: see
    `requested_simd`. All are read once per process.
    """
    return _search()[0]


def missing_toolchain() -> str:
    """Why there is no `toolchain`, and what would help."""
    return _search()[1] or NO_COMPILER


def needed_toolchain() -> Toolchain:
    """`toolchain`; KernelError if there is none."""
    tools = toolchain()
    if tools is None:
        raise KernelError(missing_toolchain())
    return tools


def _try(compiler: str, arguments: Sequence[str], folder: Path) -> Toolchain | str:
    """The compiler with the flags that it can do most with, or what is wrong with it, as a predicate."""
    extra = tuple(os.environ.get("CLICKTRAIN_CFLAGS", "").split())
    why = ""
    for tune in _TUNE:
        for openmp in (("-fopenmp",), ()):
            flags = (*_FLAGS, *tune, *openmp, *extra)
            with work_folder(folder) as work:
                tools = Toolchain(compiler, "", flags, (), native_simd(()), bool(openmp), tuple(arguments))
                why, hung = _why_unusable(tools, work)
                if hung:
                    return why
                if not why:
                    macros = _macros(tools, (*tune, *extra), work)
                    version = _version(tools, work)
                    isa = tuple(macro for macro in _ISA_MACROS if macro in macros)
                    return replace(tools, version=version, isa=isa, simd=requested_simd(native_simd(isa)))
    return why


def _why_unusable(tools: Toolchain, work: Path) -> tuple[str, bool]:
    """What is wrong with a compiler and its flags, as a predicate, and whether it hung."""
    _, done, why = tools.build(SELF_TEST, _SELF_TEST_KEY, work, self_test=True)
    if not done.problem:
        return why, False
    said = first_error(done.output).replace(f"{work}/", "")
    return f"{done.problem}{f' ({said})' if said else ''}", done.hung


def first_error(output: str) -> str:
    """The most useful line of a compiler's output."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")[:400]


def _macros(tools: Toolchain, flags: Sequence[str], work: Path) -> frozenset[str]:
    text = _output(tools, work, *flags, "-dM", "-E", "-x", "c", os.devnull)
    words = [line.split() for line in text.splitlines() if line.startswith("#define ")]
    return frozenset(line[1] for line in words if len(line) > 1)


def _version(tools: Toolchain, work: Path) -> str:
    text = _output(tools, work, "--version").strip()
    return text.splitlines()[0][:200] if text else tools.compiler


def _output(tools: Toolchain, work: Path, *flags: str) -> str:
    return run_limited([tools.compiler, *tools.arguments, *flags], compile_seconds(), work).output
