"""Generated C: the system's compiler, a cache of libraries on disk, and what generated sources share."""

from clicktrain.kernels.native.library import Library, build, load
from clicktrain.kernels.native.memory import keep_memory
from clicktrain.kernels.native.toolchain import Toolchain, toolchain
from clicktrain.kernels.native.vector import C_TYPES, STORED_TYPES, compute_type, preamble

__all__ = [
    "C_TYPES",
    "STORED_TYPES",
    "Library",
    "Toolchain",
    "build",
    "compute_type",
    "keep_memory",
    "load",
    "preamble",
    "toolchain",
]
