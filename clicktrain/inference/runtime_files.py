"""The files of the C runtime, which are the same for every network but for its name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources

PARTS = ("runtime.h", "processor.h", "runtime.c", "threads.c", "plan.h", "plan.c", "plan_taps.c",
         "plan_sets.c", "plan_pointwise.c", "measure.c", "vectors.h", "pairs.h", "taps.h", "conv.h",
         "layers.h", "kernels.h", "kernels_base.c", "kernels_avx2.c", "kernels_avx512.c",
         "kernels_pairs.c", "kernels_columns.c", "kernels_column_pairs.c", "kernels_windows.c",
         "kernels_window_pairs.c", "kernels_fours.c", "kernels_column_fours.c",
         "kernels_window_fours.c", "columns.h", "windows.h", "pointwise.h", "cells.h", "fours.h",
         "special.h")  # fmt: skip
"""Files of ``clicktrain/inference/runtime``."""
SHARED = {"vector.h": "kernels/native/vector.h", "activations.h": "kernels/activations/activations.h"}
"""Files of kernels that are compiled while training, under the names that they have here."""


def runtime_file(name: str) -> str:
    """The text of a file of ``clicktrain/inference/runtime``."""
    return resources.files("clicktrain").joinpath("inference/runtime", name).read_text(encoding="utf-8")


def runtime_texts() -> dict[str, str]:
    """Name -> text of all files that do not depend on a network."""
    texts = {name: runtime_file(name) for name in PARTS}
    for name, path in SHARED.items():
        text = resources.files("clicktrain").joinpath(path).read_text(encoding="utf-8")
        texts[name] = re.sub(r'#include "kernels/\w+/(\w+\.h)"', r'#include "\1"', text)
    return texts


def filled(text: str, values: Mapping[str, str]) -> str:
    """A template with its ``@NAME@`` exchanged."""
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def renamed(text: str, name: str) -> str:
    """Symbols and files named after a network: a program may have several. ``model_run`` -> ``NAME_run``."""
    if name == "model":
        return text
    text = re.sub(r"\bmodel_", f"{name}_", text)
    text = re.sub(r"\bMODEL_", f"{name.upper()}_", text)
    return re.sub(r"\bmodel\.(c|h|py|o)\b", rf"{name}.\1", text)
