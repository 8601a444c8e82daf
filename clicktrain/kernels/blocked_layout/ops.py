"""Conversions of ``[N, C, H, W]`` to and from ``[B, C, H, W, V]``: generated C, and the operators on it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.kernels.blocked_library import check_dtype
from clicktrain.kernels.direct import differentiable
from clicktrain.kernels.native import Library, load
from clicktrain.kernels.native.library import call
from clicktrain.kernels.native.source import begin_source, expand


def source(dtype: torch.dtype, lanes: int) -> str:
    """The functions ``block`` and ``unblock`` for one dtype and V, a power of two."""
    about = f"Conversion between [N, C, H, W] and [N/{lanes}, C, H, W, {lanes}]."
    return expand(
        begin_source(about, dtype, lanes)
        + '#include "kernels/blocked_layout/shuffles.h"\n'
        + _tile(lanes, dtype.itemsize)
        + '#include "kernels/blocked_layout/blocked_layout.c"\n'
    )


def _tile(lanes: int, size: int) -> str:
    rows = range(lanes)
    lines = [
        "",
        "INLINE void tile(const number *from, int64_t from_row, number *to, int64_t to_row,",
        "                 const int64_t rows, const int64_t out) {",
        "  const numbers zero = {0};",
        f"  numbers {', '.join(f'r{i}' for i in rows)};",
        *(f"  r{i} = {i} < rows ? *(const numbers *)(from + {i} * from_row) : zero;" for i in rows),
        *_transpose(lanes, size),
        *(f"  if ({i} < out) *(numbers *)(to + {i} * to_row) = r{i};" for i in rows),
        "}",
        "",
    ]
    return "\n".join(lines)


def _transpose(lanes: int, size: int) -> Iterator[str]:
    """Rounds over pairs of registers that are ``step`` apart; each exchanges one bit of row and column.

    Within 128 bits pairs are interleaved, which is one instruction a register for numbers of any size: column
    bits rotate there, and after the last of these rounds all are in their places. Larger steps swap the
    off-diagonal quarters of a square.
    """
    near = min(16 // size, lanes)
    half = near // 2
    step = lanes // 2
    while step:
        if step < near:
            first = [i for start in range(0, lanes, near) for i in range(start, start + half)]
            low = [i for j in first for i in (j, lanes + j)]
            high = [i + half for i in low]
        else:
            low = [lanes + j - step if j & step else j for j in range(lanes)]
            high = [i + step for i in low]
        for i in range(lanes):
            if not i & step:
                a, b = f"r{i}", f"r{i + step}"
                mixed = (f"MIX(a, b, {', '.join(map(str, indices))})" for indices in (low, high))
                yield "  {"
                yield f"    const numbers a = {a}, b = {b};"
                yield from (f"    {one} = {new};" for one, new in zip((a, b), mixed, strict=True))
                yield "  }"
        step //= 2


MAX_LANES = 16
"""Float32 in 512 bits; a tile of more lanes would not fit the registers, and take long to compile."""


def block(x: Tensor, lanes: int, out: Tensor | None = None) -> Tensor:
    """[N, C, H, W], any memory format -> [ceil(N / lanes), C, H, W, lanes]; padding lanes are zero.

    Here and in `unblock`, ``out`` is memory for the result: contiguous, every element is written.
    """
    if x.dim() != 4:
        raise UserError(f"block_batch takes [N, C, H, W], not {list(x.shape)}")
    _check(x, lanes)
    out = x.new_empty(blocked_shape(x, lanes)) if out is None else out
    n, c, h, w = x.shape
    outer, columns, by_run, by_column = 1, c * h * w, 0, 1
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        outer, columns, by_run, by_column = h * w, c, 1, h * w
    else:
        x = x.contiguous()
    sizes = (n, out.shape[0], outer, columns, by_run, by_column, torch.get_num_threads())
    if out.numel():
        call(_library(x.dtype, lanes).block, x, out, *sizes)
    return out


def unblock(x: Tensor, n: int, out: Tensor | None = None) -> Tensor:
    """[B, C, H, W, V] -> [n, C, H, W], contiguous."""
    if x.dim() != 5:
        raise UserError(f"unblock_batch takes [B, C, H, W, V], not {list(x.shape)}")
    blocks, c, h, w, lanes = x.shape
    _check(x, lanes)
    if not (blocks - 1) * lanes < n <= blocks * lanes:
        raise UserError(f"{n} images of {lanes} lanes are {-(-n // lanes)} blocks, not {blocks}")
    out = x.new_empty(n, c, h, w) if out is None else out
    if out.numel():
        sizes = (n, blocks, 1, c * h * w, 0, 1, torch.get_num_threads())
        call(_library(x.dtype, lanes).unblock, out, x.contiguous(), *sizes)
    return out


def blocked_shape(x: Tensor, lanes: int) -> tuple[int, int, int, int, int]:
    """The shape of [N, C, H, W] in blocks."""
    n, c, h, w = x.shape
    return (n + lanes - 1) // lanes, c, h, w, lanes


def _check(x: Tensor, lanes: int) -> None:
    check_dtype(x.dtype, "the blocked layout")
    if x.device.type != "cpu":
        raise UserError(f"the blocked layout is for CPUs, not for {x.device}")
    if lanes < 1 or lanes > MAX_LANES or lanes & (lanes - 1):
        raise UserError(f"{lanes} lanes: a vector has a power of two of them, at most {MAX_LANES}")


@functools.cache
def _library(dtype: torch.dtype, lanes: int) -> Library:
    return load(source(dtype, lanes))


@torch.library.custom_op("clicktrain::block_batch", mutates_args=())
def block_batch_op(x: Tensor, lanes: int) -> Tensor:
    """Put ``lanes`` images side by side: [N, C, H, W] -> [ceil(N / lanes), C, H, W, lanes].

    Contiguous or channels last is read as it lies. The result is padded with zeros. ``lanes`` is a power of
    two: ``toolchain().lanes(x.dtype)``.
    """
    return block(x, lanes)


@block_batch_op.register_fake
def _(x: Tensor, lanes: int) -> Tensor:
    return x.new_empty(blocked_shape(x, lanes))


@torch.library.custom_op("clicktrain::unblock_batch", mutates_args=())
def unblock_batch_op(x: Tensor, n: int) -> Tensor:
    """Inverse of `block_batch`: [ceil(n / V), C, H, W, V] -> [n, C, H, W], contiguous."""
    return unblock(x, n)


@unblock_batch_op.register_fake
def _(x: Tensor, n: int) -> Tensor:
    return x.new_empty(n, *x.shape[1:4])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.n, ctx.lanes = inputs[0].shape[0], inputs[0].shape[-1]


def _block_backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    return unblock_batch(g, ctx.n), None


def _unblock_backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    return block_batch(g, ctx.lanes), None


block_batch_op.register_autograd(_block_backward, setup_context=_save)
unblock_batch_op.register_autograd(_unblock_backward, setup_context=_save)

block_batch = differentiable(block_batch_op, block, _save, _block_backward)
unblock_batch = differentiable(unblock_batch_op, unblock, _save, _unblock_backward)
