"""Calls of ``batch_norm2d.c`` and ``pooled_norm.c``: checks what pointers do not say, allocates results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.kernels.activations import Activation
from clicktrain.kernels.blocked_library import ALIGNMENT, check_blocked, library_for, vectors
from clicktrain.kernels.max_pool2d.ops import check_window, output_size, tap_type
from clicktrain.kernels.native import Library, compute_type, static_source
from clicktrain.kernels.native.library import call

WHAT = "blocked batch norm"
"""In messages."""
NO_IMAGES = "an empty batch has no mean: batch norm in training mode needs at least one image"
Source = Callable[[torch.dtype, int], str]


@functools.cache
def source(activation: int = 0, pooled: bool = False) -> Source:
    """(dtype of the activations, lanes) -> C source, with the activation of a number at the end."""
    path = f"kernels/batch_norm2d/{'pooled_norm' if pooled else 'batch_norm2d'}.c"
    first = "Max pooling, batch norm" if pooled else "Batch norm"
    about = f"{first}, residual and activation on batch-blocked activations."
    return functools.partial(static_source, path, about, ACTIVATION=activation)


class Gradients(NamedTuple):
    """What the backward passes write; ``x`` and ``residual`` have no elements where not asked for."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor


class Pooled(NamedTuple):
    """What `pooled_forward` writes: the result, the maxima, their taps, and the statistics of the maxima."""

    y: Tensor
    maxima: Tensor
    taps: Tensor
    mean: Tensor
    var: Tensor


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    eps: float,
    activation: str,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm with the batch's own statistics: y like ``x``, mean and biased variance [C].

    Here and below ``out`` is memory for the results: contiguous, aligned, every element is written.
    """
    known = _check(x, n, activation, (residual,), (weight, bias))
    if n == 0:
        raise UserError(NO_IMAGES)
    channels, dtype = known.sizes[1], known.computed
    y, mean, var = out or (
        x.new_empty(x.shape),
        x.new_empty(channels, dtype=dtype),
        x.new_empty(channels, dtype=dtype),
    )
    (x, residual), (weight, bias) = _readable((x, residual), (weight, bias))
    numbers = eps, *known.limits, n, *known.sizes, torch.get_num_threads()
    call(known.library.forward, x, residual, y, weight, bias, mean, var, *numbers)
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
    activation: str,
    out: Tensor | None = None,
) -> Tensor:
    """Batch norm with the mean and biased variance given: y like ``x``."""
    y = x.new_empty(x.shape) if out is None else out
    known = _check(x, n, activation, (residual,), (weight, bias, mean, var))
    (x, residual), (weight, bias, mean, var) = _readable((x, residual), (weight, bias, mean, var))
    numbers = eps, *known.limits, *known.sizes, torch.get_num_threads()
    call(known.library.given, x, residual, y, weight, bias, mean, var, *numbers)
    return y


def affine(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    n: int,
    activation: str,
    out: Tensor | None = None,
) -> Tensor:
    """Scaling by channel: y like ``x``."""
    y = x.new_empty(x.shape) if out is None else out
    known = _check(x, n, activation, (residual,), (scale, shift))
    (x, residual), (scale, shift) = _readable((x, residual), (scale, shift))
    numbers = *known.limits, *known.sizes, torch.get_num_threads()
    call(known.library.affine, x, residual, y, scale, shift, *numbers)
    return y


def backward(
    gy: Tensor,
    x: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    n: int,
    eps: float,
    activation: str,
    need_residual: bool,
    out: Gradients | None = None,
) -> Gradients:
    """Gradients of `forward` and `given`.

    Args:
        gy: [B, C, H, W, V].
        x: the input.
        y: the result; with a residual and an activation whose gradient is computed from it, else None.
        residual: what was added, if there is another activation; else None.
        weight, bias, mean, var, n, eps, activation, out: as above.
        need_residual: also write the gradient in front of the activation; without one that is ``gy``.
    """
    known = _check(gy, n, activation, (x, y, residual), (weight, bias, mean, var))
    gx, gweight, gbias, gr = out = out or _gradients(gy, known, True, need_residual)
    blocked, parameters = _readable((gy, x, y, residual), (weight, bias, mean, var))
    numbers = eps, *known.limits, n, *known.sizes, torch.get_num_threads()
    own = gr if gr.numel() else None
    call(known.library.backward, *blocked, gx, own, *parameters, gweight, gbias, *numbers)
    return out


def affine_backward(
    gy: Tensor,
    x: Tensor | None,
    y: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    n: int,
    activation: str,
    need_x: bool,
    need_residual: bool,
    out: Gradients | None = None,
) -> Gradients:
    """Gradients of `affine`.

    ``x`` may be None if nobody asks for the gradient of the scale, which is 0 then, and the activation's
    gradient is computed from ``y``, if there is one. Without ``need_x`` that of ``x`` is left out; the rest
    is as of `backward`.
    """
    known = _check(gy, n, activation, (x, y, residual), (scale, shift))
    gx, gscale, gshift, gr = out = out or _gradients(gy, known, need_x, need_residual)
    blocked, parameters = _readable((gy, x, y, residual), (scale, shift))
    numbers = *known.limits, n, *known.sizes, torch.get_num_threads()
    written = (one if one.numel() else None for one in (gx, gr))
    call(known.library.affine_backward, *blocked, *written, *parameters, gscale, gshift, *numbers)
    return out


def pooled_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    window: Sequence[int],
    ceil: bool,
    n: int,
    eps: float,
    activation: str,
    out: Pooled | None = None,
) -> Pooled:
    """Max pooling, then `forward` of the maxima; ``window`` and ``ceil`` as of ``max_pool2d_blocked``."""
    shape = pooled_shape(x, window, ceil)
    if out is None:
        taps = x.new_empty(shape, dtype=tap_type(shape[4]))
        out = Pooled(x.new_empty(shape), x.new_empty(shape), taps, per_channel(x), per_channel(x))
    known = _check(x, n, activation, (residual,), (weight, bias), shape)
    if n == 0:
        raise UserError(NO_IMAGES)
    planes = *x.shape[2:4], *shape[2:4]
    (x, residual), (weight, bias) = _readable((x, residual), (weight, bias))
    numbers = eps, *known.limits, n, *shape[:2], *planes, *window, torch.get_num_threads()
    written = out.maxima, out.taps, out.y
    call(known.library.forward, x, residual, *written, weight, bias, out.mean, out.var, *numbers)
    return out


def pooled_given(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    window: Sequence[int],
    ceil: bool,
    n: int,
    eps: float,
    activation: str,
    out: Tensor | None = None,
) -> Tensor:
    """Max pooling, then `given` of the maxima."""
    shape = pooled_shape(x, window, ceil)
    y = x.new_empty(shape) if out is None else out
    statistics = weight, bias, mean, var
    known = _check(x, n, activation, (residual,), statistics, shape)
    planes = *x.shape[2:4], *shape[2:4]
    (x, residual), parameters = _readable((x, residual), statistics)
    numbers = eps, *known.limits, *shape[:2], *planes, *window, torch.get_num_threads()
    call(known.library.given, x, residual, y, *parameters, *numbers)
    return y


def pooled_backward(
    gy: Tensor,
    maxima: Tensor,
    taps: Tensor,
    y: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    size: Sequence[int],
    window: Sequence[int],
    n: int,
    eps: float,
    activation: str,
    need_residual: bool,
    out: Gradients | None = None,
) -> Gradients:
    """Gradients of `pooled_forward`; ``size`` is (H, W) of its input, the rest as of `backward`."""
    shape, threads = gy.shape, torch.get_num_threads()
    same, statistics = (maxima, y, residual), (weight, bias, mean, var)
    known = _check(gy, n, activation, same, statistics, shape)
    if out is None:
        gx = gy.new_empty((*shape[:2], *size, shape[4]))
        out = _gradients(gy, known, False, need_residual)._replace(x=gx)
    if taps.shape != shape or taps.dtype is not tap_type(shape[4]):
        raise UserError(f"taps are {list(shape)}, not {list(taps.shape)} of {taps.dtype}")
    blocked, parameters = _readable((gy, *same), statistics)
    scratch = gy.new_empty((threads, shape[0], *shape[2:]))
    numbers = eps, *known.limits, n, *shape[:2], *size, *shape[2:4], *window, threads
    written = out.x, out.residual if out.residual.numel() else None, scratch
    call(
        known.library.backward, *blocked, vectors(taps), *written, *parameters, out.weight, out.bias, *numbers
    )
    return out


def pooled_shape(x: Tensor, window: Sequence[int], ceil: bool) -> tuple[int, ...]:
    """The shape of the maxima, [B, C, H', W', V]; a UserError if windows do not fit."""
    check_window(window)
    size = output_size(x.shape[2:4], window, ceil)
    if min(size) < 1:
        raise UserError(f"a window of {window[:2]} does not fit images of {list(x.shape[2:4])}")
    return (*x.shape[:2], *size, x.shape[4])


def per_channel(x: Tensor) -> Tensor:
    """Allocate one number per channel [C], in the computed dtype."""
    return x.new_empty(x.shape[1], dtype=compute_type(x.dtype))


def _gradients(gy: Tensor, known: _Known, need_x: bool, need_residual: bool) -> Gradients:
    channels, dtype = known.sizes[1], known.computed
    return Gradients(
        gy.new_empty(gy.shape if need_x else (0,)),
        gy.new_empty(channels, dtype=dtype),
        gy.new_empty(channels, dtype=dtype),
        gy.new_empty(gy.shape if need_residual and known.active else (0,)),
    )


def _check(
    x: Tensor,
    n: int,
    activation: str,
    same: tuple[Tensor | None, ...],
    parameters: tuple[Tensor | None, ...],
    maxima: Sequence[int] | None = None,
) -> _Known:
    """What is known for ``x``, once everything is as the C text takes it for granted.

    ``same`` are like ``x``, or of the shape of the ``maxima`` where these are normalized.
    """
    known = _known(x.shape, x.dtype, x.device, activation, maxima is not None)
    shape, lanes = x.shape if maxima is None else maxima, known.lanes
    if not (shape[0] - 1) * lanes < n <= shape[0] * lanes:
        raise UserError(f"{n} images of {lanes} lanes are {-(-n // lanes)} blocks, not {shape[0]}")
    wanted = (shape, x.dtype, same), (shape[1:2], known.computed, parameters)
    for own_shape, own_dtype, tensors in wanted:
        for one in tensors:
            if one is None:
                continue
            if one.shape != own_shape or one.dtype != own_dtype:
                raise UserError(
                    f"{WHAT} wants {list(own_shape)} of {own_dtype} beside its input of {x.dtype}, "
                    f"not {list(one.shape)} of {one.dtype}"
                )
            if not one.is_cpu:
                raise UserError(f"{WHAT} is for CPUs, not for {one.device}")
    return known


class _Known(NamedTuple):
    """What does not change from step to step: ``sizes`` are blocks, channels and area."""

    library: Library
    sizes: tuple[int, int, int]
    limits: tuple[float, float]
    lanes: int
    computed: torch.dtype
    active: bool


@functools.lru_cache(maxsize=1024)
def _known(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, activation: str, pooled: bool
) -> _Known:
    check_blocked(shape, dtype, device, WHAT)
    sizes = shape[0], shape[1], shape[2] * shape[3]
    act = Activation.read(activation)
    library = library_for(source(act.number, pooled), dtype)
    return _Known(library, sizes, (act.low, act.high), shape[4], compute_type(dtype), act.number > 0)


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
