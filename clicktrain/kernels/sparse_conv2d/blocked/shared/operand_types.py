"""Macros of ``operand_types.h``: whether and which numbers are multiplied in pairs."""

from __future__ import annotations

import math

import torch

from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase


def distance(phase: Phase, problem: ConvProblem) -> int:
    """Columns of the source between what neighboring taps of a row read for one result."""
    axis = problem.columns
    if phase == "dgrad":
        return axis.dilation // math.gcd(axis.dilation, axis.stride)
    return axis.dilation


def as_stored(phase: Phase, pairs: bool, dtype: torch.dtype) -> bool:
    """Whether activations are computed with as they lie in memory, without a copy of another dtype."""
    return dtype is not torch.bfloat16 or (pairs and phase == "wgrad")


def operand_macros(phase: Phase, problem: ConvProblem, pairs: bool) -> dict[str, int | str]:
    """The macros of ``operand_types.h``."""
    if not pairs:
        return {"PAIRS": "NONE"}
    return {"PAIRS": "IMAGES" if phase == "wgrad" else "COLUMNS", "DISTANCE": distance(phase, problem)}
