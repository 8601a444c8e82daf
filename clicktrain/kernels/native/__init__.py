"""Generated C: the system's compiler, a cache of libraries on disk, and static parts of the sources."""

from clicktrain.kernels.native.c_compiler import Toolchain, missing_toolchain, needed_toolchain, toolchain
from clicktrain.kernels.native.failure import KernelError
from clicktrain.kernels.native.library import Library, build, load
from clicktrain.kernels.native.memory import keep_memory
from clicktrain.kernels.native.source import C_TYPES, STORED_TYPES, compute_type, static_source

__all__ = [
    "C_TYPES",
    "STORED_TYPES",
    "KernelError",
    "Library",
    "Toolchain",
    "build",
    "compute_type",
    "keep_memory",
    "load",
    "missing_toolchain",
    "needed_toolchain",
    "static_source",
    "toolchain",
]
