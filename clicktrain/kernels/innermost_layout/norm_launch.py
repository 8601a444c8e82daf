"""Batch norm in training, an addition and ReLU as two passes over ``[C, H, W, N]``, and back as two.

A channel is contiguous in this layout. Forward: statistics (or the convolution before has taken them), then
``act((x - mean) * scale + shift + residual)``. Backward: two sums by channel, then the gradient
w.r.t. the input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clicktrain.kernels.innermost_layout import norm_kernels
from clicktrain.kernels.triton_run import interpreted, missing_triton, run_kernel

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BLOCK, BLOCKS = 2048, 4
"""Numbers of a step of a program, 16 a thread, and its steps."""
_WARPS = 4


def has_kernels(x: Tensor, activation: str) -> bool:
    """Whether Triton's kernels can run it: on a GPU, or in the interpreter where that is asked for."""
    runs = x.device.type == "cuda" or (x.device.type == "cpu" and interpreted())
    known = activation in ("none", "relu") and x.dtype in _DTYPES and x.numel() > 0
    return runs and known and missing_triton() is None


def _chunks(x: Tensor) -> int:
    return -(-x[0].numel() // (BLOCK * BLOCKS))


def _run(function: Callable[..., None], x: Tensor, *arguments: Any, **constants: Any) -> None:
    chunks = _chunks(x)
    fixed = {"BLOCK": BLOCK, "BLOCKS": BLOCKS, "WIDE": x.dtype is torch.float64, **constants}
    cut = f"{BLOCKS} blocks of {BLOCK}"
    sizes = x[0].numel(), chunks
    run_kernel(function, (x.shape[0] * chunks,), x.device, (*arguments, *sizes), fixed, warps=_WARPS, cut=cut)


def _computed(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of contiguous ``x`` [C, H, W, N], in float32, of float64 ``x`` float64."""
    chunks, size = _chunks(x), x[0].numel()
    sums = x.new_empty(2, chunks, x.shape[0], dtype=_computed(x))
    _run(norm_kernels.channel_statistics, x, x, sums, x.shape[0])
    means, squares = sums.double()
    counts = torch.full((chunks, 1), float(BLOCK * BLOCKS), dtype=torch.float64, device=x.device)
    counts[-1] = size - (chunks - 1) * BLOCK * BLOCKS
    mean = (means * counts).sum(0) / size
    variance = (squares.sum(0) + (counts * (means - mean).square()).sum(0)) / size
    return mean.to(sums.dtype), variance.to(sums.dtype)


def normalized(
    x: Tensor, mean: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool
) -> Tensor:
    """``act((x - mean) * scale + shift + residual)``, without gradients.

    Args:
        x: [C, H, W, N]; the residual, if any, like it.
        mean, scale, shift: [C].
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    numbers = (one.to(_computed(x)).contiguous() for one in (mean, scale, shift))
    added = x if residual is None else residual.to(x.dtype).contiguous()
    _run(norm_kernels.normalize, x, x, *numbers, added, y, RESIDUAL=residual is not None, RELU=relu)
    return y


class FusedNorm(torch.autograd.Function):
    """Batch norm by the statistics of its input, an addition and ReLU; gradients are those of the whole."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        relu: bool,
    ) -> Tensor:
        """Arguments as of `normalized`; ``weight`` and ``bias`` are [C] or None."""
        x = x.contiguous()
        mean, variance = (one.to(_computed(x)) for one in (mean, variance))
        rstd = torch.rsqrt(variance + eps)
        scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
        shift = torch.zeros_like(rstd) if bias is None else bias.to(rstd.dtype)
        y = normalized(x, mean, scale, shift, residual, relu)
        # What was before ReLU is computed again from x; with a residual that would have to be kept as well,
        # and the result is kept by what reads it.
        ctx.relu, ctx.by_result = relu, relu and residual is not None
        ctx.save_for_backward(x, y if ctx.by_result else None, weight, bias, mean, rstd, scale, shift)
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Any:
        """Gradients of x, weight, bias and residual."""
        x, y, weight, bias, mean, rstd, scale, shift = ctx.saved_tensors
        need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
        gy = gy.to(x.dtype).contiguous()
        result = x if y is None else y
        by_channel, flags = (mean, scale, shift), {"RELU": ctx.relu, "BY_RESULT": ctx.by_result}
        sums = x.new_empty(2, _chunks(x), x.shape[0], dtype=mean.dtype)
        _run(norm_kernels.gradient_sums, x, gy, x, result, *by_channel, sums, x.shape[0], **flags)
        plain, along = sums.double().sum(1).to(mean.dtype)
        gx = gr = None
        own_residual = need_residual and ctx.relu
        if need_x or own_residual:
            size = x[0].numel()
            slope, level = scale * rstd.square() * along / size, scale * plain / size
            gx, gr = torch.empty_like(x), torch.empty_like(x) if own_residual else x
            arguments = (gy, x, result, *by_channel, slope, level, gx, gr)
            _run(norm_kernels.input_gradient, x, *arguments, **flags, RESIDUAL=own_residual)
        return (
            gx if need_x else None,
            (along * rstd).to(weight.dtype) if need_weight else None,
            plain.to(bias.dtype) if need_bias else None,
            (gr if own_residual else gy) if need_residual else None,
            *[None] * 4,
        )
