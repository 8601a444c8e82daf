"""Calls of the generated conversions."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.kernels.blocked_layout.codegen import source
from clicktrain.kernels.blocked_library import check_dtype
from clicktrain.kernels.native import Library, load
from clicktrain.kernels.native.library import call

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
