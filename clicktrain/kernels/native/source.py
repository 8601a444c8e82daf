"""C source of kernels: static files of the package, the macros that they take, and generated parts."""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections.abc import Mapping

import torch

C_TYPES = {torch.float32: "float", torch.float64: "double"}
"""Dtypes that kernels compute in."""
STORED_TYPES = (*C_TYPES, torch.bfloat16)
"""Dtypes that activations may be stored in."""
_INCLUDE = re.compile(r'^#include "(.+)"\n', re.MULTILINE)


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """Dtype that kernels compute in, and of their parameters, for activations of a dtype."""
    return torch.float32 if dtype is torch.bfloat16 else dtype


def begin_source(
    about: str, dtype: torch.dtype, lanes: int, macros: Mapping[str, int | str] | None = None
) -> str:
    """The first lines of a kernel's source: what it is, and the macros that its static parts take.

    ``lanes`` is V, elements of the dtype's `compute_type` in one SIMD vector.
    """
    name = str(dtype).removeprefix("torch.").upper()
    lines = [f"// {line}" for line in about.splitlines()]
    lines += [f"#define LANES {lanes}", f"#define DTYPE {name}"]
    for macro, value in (macros or {}).items():
        lines.append(f"#define {macro} {value if isinstance(value, str) else f'{value}L'}")
    return "\n".join([*lines, '#include "kernels/native/vector.h"', ""])


def static_source(path: str, about: str, dtype: torch.dtype, lanes: int, **macros: int) -> str:
    """The whole source of a kernel that is one file of the package; arguments as of `begin_source`."""
    return expand(f'{begin_source(about, dtype, lanes, macros)}#include "{path}"\n')


def expand(source: str) -> str:
    """Replace each ``#include "FILE"`` by that file of the package, once: what is compiled stands alone.

    So the text is all that a library depends on, and the key of the kernel cache covers every header.
    """
    seen: set[str] = set()

    def included(match: re.Match[str]) -> str:
        path = match[1]
        if path in seen:
            return ""
        seen.add(path)
        return f"\n// ---------------- clicktrain/{path}\n\n{_INCLUDE.sub(included, read_static(path))}"

    return _INCLUDE.sub(included, source)


@functools.cache
def read_static(path: str) -> str:
    """A static C file, by its path inside the package."""
    text = importlib.resources.files("clicktrain").joinpath(path).read_text(encoding="utf-8")
    return text.replace("#pragma once\n", "")
