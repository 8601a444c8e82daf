"""Calls of ``batch_norm2d.c``: checks what pointers do not say, and allocates results."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.kernels.blocked_library import ALIGNMENT, check_blocked, library_for, vectors
from clicktrain.kernels.native import Library, compute_type, static_source
from clicktrain.kernels.native.library import call

WHAT = "blocked batch norm"
"""In messages."""
source = functools.partial(
    static_source,
    "kernels/batch_norm2d/batch_norm2d.c",
    "Batch norm, residual and ReLU on batch-blocked activations.",
)
"""(dtype of the activations, lanes) -> C source."""


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
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with the batch's own statistics: y like ``x``, mean and biased variance [C].

    Here and below ``out`` is memory for the results: contiguous, aligned, every element is written.
    """
    y, mean, var = out or (x.new_empty(x.shape), per_channel(x), per_channel(x))
    library, sizes = _check(x, n, (residual,), (weight, bias))
    if n == 0:
        raise UserError("an empty batch has no mean: batch norm in training mode needs at least one image")
    (x, residual), (weight, bias) = _readable((x, residual), (weight, bias))
    threads = torch.get_num_threads()
    call(library.forward, x, residual, y, weight, bias, mean, var, eps, relu, n, *sizes, threads)
    return y, mean, var


def given(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    eps: float,
    relu: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Batch norm with the mean and biased variance given: y like ``x``."""
    y = x.new_empty(x.shape) if out is None else out
    library, sizes = _check(x, n, (residual,), (weight, bias, mean, var))
    (x, residual), (weight, bias, mean, var) = _readable((x, residual), (weight, bias, mean, var))
    threads = torch.get_num_threads()
    call(library.given, x, residual, y, weight, bias, mean, var, eps, relu, *sizes, threads)
    return y


def affine(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    n: int,
    relu: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Scaling by channel: y like ``x``."""
    y = x.new_empty(x.shape) if out is None else out
    library, sizes = _check(x, n, (residual,), (scale, shift))
    (x, residual), (scale, shift) = _readable((x, residual), (scale, shift))
    call(library.affine, x, residual, y, scale, shift, relu, *sizes, torch.get_num_threads())
    return y


def backward(
    gy: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    weight: Tensor | None,
    statistics: tuple[Tensor, Tensor, float] | None,
    n: int,
    need_residual: bool,
    out: Gradients | None = None,
) -> Gradients:
    """Gradients of `forward` and `given`, or of `affine` where there are no statistics.

    Args:
        gy: [B, C, H, W, V].
        x: the input; None with `affine` if nobody asks for the gradient of its scale, which is 0 then.
        y: the result if it went through a ReLU.
        weight: of batch norm, or the scale.
        statistics: mean, biased variance and eps of batch norm.
        n, out: as above.
        need_residual: also write ``gy`` where ``y`` is positive; only with ``y``, else that is ``gy``.
    """
    if out is None:
        gr = gy.new_empty(gy.shape if need_residual and y is not None else 0)
        out = Gradients(gy.new_empty(gy.shape), per_channel(gy), per_channel(gy), gr)
    mean, var, eps = statistics or (None, None, 0.0)
    library, sizes = _check(gy, n, (x, y), (weight, mean, var))
    (gy, x, y), (weight, mean, var) = _readable((gy, x, y), (weight, mean, var))
    residual = out.residual if out.residual.numel() else None
    numbers = eps, n, *sizes, torch.get_num_threads()
    call(library.backward, gy, x, y, out.x, residual, weight, mean, var, out.weight, out.bias, *numbers)
    return out


def per_channel(x: Tensor) -> Tensor:
    """Allocate one number per channel [C], in the computed dtype."""
    return x.new_empty(x.shape[1], dtype=compute_type(x.dtype))


def _check(
    x: Tensor, n: int, same: tuple[Tensor | None, ...], parameters: tuple[Tensor | None, ...]
) -> tuple[Library, tuple[int, int, int]]:
    """Library and sizes for ``x``, once everything is as the C text takes it for granted."""
    shape, dtype = x.shape, x.dtype
    library, sizes, lanes, computed = _known(shape, dtype, x.device)
    if not (shape[0] - 1) * lanes < n <= shape[0] * lanes:
        raise UserError(f"{n} images of {lanes} lanes are {-(-n // lanes)} blocks, not {shape[0]}")
    wanted = (shape, dtype, same), (shape[1:2], computed, parameters)
    for own_shape, own_dtype, tensors in wanted:
        for one in tensors:
            if one is None:
                continue
            if one.shape != own_shape or one.dtype != own_dtype:
                raise UserError(
                    f"{WHAT} wants {list(own_shape)} of {own_dtype} beside its input of {dtype}, "
                    f"not {list(one.shape)} of {one.dtype}"
                )
            if not one.is_cpu:
                raise UserError(f"{WHAT} is for CPUs, not for {one.device}")
    return library, sizes


@functools.lru_cache(maxsize=1024)
def _known(
    shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> tuple[Library, tuple[int, int, int], int, torch.dtype]:
    """What does not change from step to step: library, (blocks, channels, area), lanes, computed dtype."""
    check_blocked(shape, dtype, device, WHAT)
    sizes = shape[0], shape[1], shape[2] * shape[3]
    return library_for(source, dtype), sizes, shape[4], compute_type(dtype)


def _readable(
    blocked: tuple[Tensor | None, ...], parameters: tuple[Tensor | None, ...]
) -> tuple[list[Any], list[Any]]:
    """Activations as `vectors` returns them, and contiguous parameters."""
    activations, numbers = list(blocked), list(parameters)
    for place, x in enumerate(blocked):
        if x is not None and not (x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0):
            activations[place] = vectors(x)
    for place, x in enumerate(parameters):
        if x is not None and not x.is_contiguous():
            numbers[place] = x.contiguous()
    return activations, numbers
