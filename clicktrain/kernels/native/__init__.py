"""Generated C: the system's compiler, a cache of libraries on disk, and what generated sources share."""

from clicktrain.kernels.native.c_compiler import Toolchain, missing_toolchain, needed_toolchain, toolchain
from clicktrain.kernels.native.failure import KernelError
from clicktrain.kernels.native.library import Library, build, load
from clicktrain.kernels.native.memory import keep_memory
from clicktrain.kernels.native.vector import C_TYPES, STORED_TYPES, compute_type, integer_vectors, preamble

__all__ = [
    "C_TYPES",
    "STORED_TYPES",
    "KernelError",
    "Library",
    "Toolchain",
    "build",
    "compute_type",
    "integer_vectors",
    "keep_memory",
    "load",
    "missing_toolchain",
    "needed_toolchain",
    "preamble",
    "toolchain",
]
