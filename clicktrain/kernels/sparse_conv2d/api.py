"""Sparse convolution: its arguments, and the implementations of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

from clicktrain.formats.packed import Structure
from clicktrain.kernels.impls import IMPLS as ALL_IMPLS
from clicktrain.kernels.impls import Impl, register
from clicktrain.kernels.sparse_conv2d.impl import blocked, reference, semi_structured, triton

Pair: TypeAlias = int | tuple[int, int]
Padding: TypeAlias = int | tuple[int, int] | str

OPERATOR = "sparse_conv2d"
for _impl in (reference.IMPL, blocked.IMPL, triton.IMPL, semi_structured.IMPL):
    register(OPERATOR, _impl)
IMPLS: Mapping[str, Impl] = ALL_IMPLS[OPERATOR]
"""Implementations by name."""


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    structure: Structure,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Padding = 0,
    dilation: Pair = 1,
    groups: int = 1,
    impl: str = "reference",
) -> Tensor:
    """Convolve with a packed weight; equals ``F.conv2d`` with the unpacked one. ClickTrain section 5.2.

    Args:
        x: [N, groups*C, H, W] or [groups*C, H, W].
        values: kept weights, shape ``structure.values_shape``, as `pack_values` gives them.
        structure: positions of the kept weights in [F, C, R, S].
        bias: [F] or None.
        stride, padding, dilation, groups: as in ``F.conv2d``; padding ``"same"`` wants stride 1.
        impl: key of `IMPLS`. There is no fallback: what an implementation cannot do it refuses.

    Returns:
        [N, F, H', W'] or [F, H', W'].

    Raises:
        ValueError: unknown ``impl``, or arguments that do not fit each other.
    """
    f, c, _, _ = structure.shape
    if x.dim() not in (3, 4) or x.shape[-3] != c * groups:
        raise ValueError(f"x has to be [N, {c * groups}, H, W] or without N, got {list(x.shape)}")
    if tuple(values.shape) != structure.values_shape:
        raise ValueError(f"values have to be {structure.values_shape}, got {tuple(values.shape)}")
    if f % groups:
        raise ValueError(f"{f} filters cannot be split into {groups} groups")
    if bias is not None and tuple(bias.shape) != (f,):
        raise ValueError(f"bias has to be ({f},), got {tuple(bias.shape)}")
    run = implementation(impl).run
    return run(x, values, structure, bias, pair(stride), padding_pair(padding), pair(dilation), groups)


def implementation(name: str) -> Impl:
    """The implementation of that name; ValueError if there is none."""
    if name not in IMPLS:
        raise ValueError(f"there is no implementation {name!r} of sparse_conv2d; there are {sorted(IMPLS)}")
    return IMPLS[name]


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """Spell a size out as (rows, columns)."""
    if isinstance(value, int):
        return value, value
    rows, columns = value
    return rows, columns


def padding_pair(value: int | str | tuple[int, ...]) -> tuple[int, int] | str:
    """Spell a padding out, "same" and "valid" left as they are."""
    if isinstance(value, str):
        if value not in ("same", "valid"):
            raise ValueError(f"padding is a number, a pair, 'same' or 'valid', got {value!r}")
        return value
    return pair(value)
