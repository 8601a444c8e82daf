"""Calls of the generated C: checks what pointers cannot say of themselves, and makes room for results."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.kernels.blocked_library import check_blocked, library_for
from clicktrain.kernels.native import Library, compute_type, static_source
from clicktrain.kernels.native.library import call
from clicktrain.kernels.sparse_conv2d.blocked.layout import vectors

WHAT = "blocked batch norm"
"""In messages."""


def source(dtype: torch.dtype, lanes: int) -> str:
    """C source for activations of a dtype and V = ``lanes``."""
    about = "Batch norm, residual and ReLU on batch-blocked activations."
    return static_source("kernels/batch_norm2d/batch_norm2d.c", about, dtype, lanes)


class Gradients(NamedTuple):
    """What the backward passes write; ``residual`` has no elements where it was not asked for."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with the batch's own statistics: y like ``x``, mean and biased variance [C]."""
    results = x.new_empty(x.shape), per_channel(x), per_channel(x)
    forward_into(results, x, weight, bias, residual, n, eps, relu)
    return results


def forward_into(
    results: tuple[Tensor, Tensor, Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    eps: float,
    relu: bool,
) -> None:
    """`forward` into given tensors: contiguous, aligned, every element is written."""
    library = _check(x, n, (residual,), (weight, bias))
    if n == 0:
        raise UserError("an empty batch has no mean: batch norm in training mode needs at least one image")
    x, residual, weight, bias = vectors(x), _vectors(residual), _plain(weight), _plain(bias)
    y, mean, var = results
    call(library.forward, x, residual, y, weight, bias, mean, var, eps, relu, n, *_sizes(x))


def given(
    x: Tensor,
    statistics: tuple[Tensor, Tensor, float],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    relu: bool,
) -> Tensor:
    """Batch norm with the mean, biased variance and eps given: y like ``x``."""
    y = x.new_empty(x.shape)
    given_into(y, x, statistics, weight, bias, residual, n, relu)
    return y


def given_into(
    y: Tensor,
    x: Tensor,
    statistics: tuple[Tensor, Tensor, float],
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    relu: bool,
) -> None:
    """`given` into a given tensor: contiguous, aligned, every element is written."""
    mean, var, eps = statistics
    library = _check(x, n, (residual,), (weight, bias, mean, var))
    x, residual, weight, bias = vectors(x), _vectors(residual), _plain(weight), _plain(bias)
    mean, var = mean.contiguous(), var.contiguous()
    call(library.given, x, residual, y, weight, bias, mean, var, eps, relu, *_sizes(x))


def affine(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, n: int, relu: bool) -> Tensor:
    """Scaling by channel: y like ``x``."""
    y = x.new_empty(x.shape)
    affine_into(y, x, scale, shift, residual, n, relu)
    return y


def affine_into(
    y: Tensor, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, n: int, relu: bool
) -> None:
    """`affine` into a given tensor: contiguous, aligned, every element is written."""
    library = _check(x, n, (residual,), (scale, shift))
    x, residual, scale, shift = vectors(x), _vectors(residual), scale.contiguous(), shift.contiguous()
    call(library.affine, x, residual, y, scale, shift, relu, *_sizes(x))


def backward(
    gy: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    statistics: tuple[Tensor, Tensor, float] | None,
    n: int,
    need_residual: bool,
) -> Gradients:
    """Gradients of `forward` and `given`, or of `affine` where there are no statistics.

    Args:
        gy: [B, C, H, W, V].
        x: the input; None with `affine` if nobody asks for the gradient of its scale, which is 0 then.
        y: the result if it went through a ReLU.
        weight: of batch norm, or the scale.
        statistics: mean, biased variance and eps of batch norm.
        n: images.
        need_residual: also write ``gy`` where ``y`` is positive; only with ``y``, else that is ``gy``.
    """
    gr = gy.new_empty(gy.shape if need_residual and y is not None else 0)
    results = Gradients(gy.new_empty(gy.shape), per_channel(gy), per_channel(gy), gr)
    backward_into(results, gy, x, y, weight, statistics, n)
    return results


def backward_into(
    results: Gradients,
    gy: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    statistics: tuple[Tensor, Tensor, float] | None,
    n: int,
) -> None:
    """`backward` into given tensors: contiguous, aligned, every element is written."""
    mean, var, eps = statistics or (None, None, 0.0)
    library = _check(gy, n, (x, y), (weight, mean, var))
    gy, x, y, gr = (
        vectors(gy),
        _vectors(x),
        _vectors(y),
        results.residual if results.residual.numel() else None,
    )
    weight, mean, var = _plain(weight), _plain(mean), _plain(var)
    call(
        library.backward,
        gy,
        x,
        y,
        results.x,
        gr,
        weight,
        mean,
        var,
        results.weight,
        results.bias,
        eps,
        n,
        *_sizes(gy),
    )


def per_channel(x: Tensor) -> Tensor:
    """Room for a number per channel [C] of activations, of the type that is computed in."""
    return x.new_empty(x.shape[1], dtype=compute_type(x.dtype))


def _check(
    x: Tensor, n: int, same: tuple[Tensor | None, ...], parameters: tuple[Tensor | None, ...]
) -> Library:
    """The library for ``x``, once everything is as the C text takes it for granted."""
    check_blocked(x, WHAT)
    lanes = x.shape[4]
    if not (x.shape[0] - 1) * lanes < n <= x.shape[0] * lanes:
        raise UserError(f"{n} images of {lanes} lanes are {-(-n // lanes)} blocks, not {x.shape[0]}")
    computed = compute_type(x.dtype)
    for shape, dtype, tensors in ((x.shape, x.dtype, same), (x.shape[1:2], computed, parameters)):
        for one in tensors:
            if one is not None and (one.shape != shape or one.dtype != dtype):
                raise UserError(
                    f"{WHAT} wants {list(shape)} of {dtype} beside its input of {x.dtype}, "
                    f"not {list(one.shape)} of {one.dtype}"
                )
    for one in (*same, *parameters):
        if one is not None and one.device.type != "cpu":
            raise UserError(f"{WHAT} is for CPUs, not for {one.device}")
    return library_for(source, x.dtype)


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    """Blocks, channels, area and threads: how all argument lists end."""
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3], torch.get_num_threads()


def _vectors(x: Tensor | None) -> Tensor | None:
    return None if x is None else vectors(x)


def _plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
