"""The operators that PyTorch sees: batch norm and scaling by channel, each with residual and activation.

Shapes and gradients are declared, so that they work under autograd, ``torch.compile`` and ``torch.export``.
Activations are ``[B, C, H, W, V]`` with B = ceil(n / V). The padding lanes of the last block may hold
anything in ``x``, ``residual`` and results; gradients have zeros there.

Activations and their gradients have one dtype; numbers per channel and their gradients have the computed one:
float32 for bfloat16 activations, else the same. An activation is the text of a
`clicktrain.kernels.activations.Activation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clicktrain.kernels.activations import Activation
from clicktrain.kernels.batch_norm2d import launch
from clicktrain.kernels.direct import differentiable, plain

Four = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("clicktrain::batch_norm2d_blocked", mutates_args=())
def batch_norm2d_blocked_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm in training mode: ``act((x - mean) / sqrt(var + eps) * weight + bias + residual)``.

    Args:
        x: [B, C, H, W, V], float32, float64 or bfloat16, V the vector lanes of that type.
        weight, bias: [C], or None for ones and zeros.
        residual: like ``x``, or None.
        n: images in the batch.
        eps: what is added to the variance.
        activation: what the sum goes through; ``none`` leaves it.

    Returns:
        The result like ``x``; mean and biased variance [C] over n x H x W numbers, both without gradient.
    """
    return launch.forward(x, weight, bias, residual, n, eps, activation)


@batch_norm2d_blocked_op.register_fake
def _(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), launch.per_channel(x), launch.per_channel(x)


@torch.library.custom_op("clicktrain::batch_norm2d_blocked_given", mutates_args=())
def batch_norm2d_blocked_given_op(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    n: int,
    eps: float,
    activation: str,
) -> Tensor:
    """`batch_norm2d_blocked` of an ``x`` whose mean and biased variance [C] are known already.

    They are a function of ``x``, and gradients are those of the whole: what ``x`` changes in them counts in
    its gradient, and they have none themselves. Statistics that do not depend on ``x`` are a scaling by
    channel: `affine_blocked`.
    """
    return launch.given(x, mean, var, weight, bias, residual, n, eps, activation)


def _run_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, bias, residual; the last is empty where it is ``gy`` or not needed."""
    rest = n, eps, activation, need_residual
    return launch.backward(gy, x, y, residual, weight, bias, mean, var, *rest)


batch_norm2d_blocked_backward_op = torch.library.custom_op(
    "clicktrain::batch_norm2d_blocked_backward", _run_backward, mutates_args=()
)
batch_norm2d_blocked_backward = plain(batch_norm2d_blocked_backward_op, _run_backward)


@torch.library.custom_op("clicktrain::affine_blocked", mutates_args=())
def affine_blocked_op(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, n: int, activation: str
) -> Tensor:
    """Scaling by channel and an activation: ``act(x * scale + shift + residual)``.

    Batch norm with statistics that are no function of ``x``, or a bias and an activation alone. Scale and
    shift are [C], or None for ones and zeros; activations are as of `batch_norm2d_blocked`; only gradients
    depend on the ``n`` images.
    """
    return launch.affine(x, scale, shift, residual, n, activation)


@batch_norm2d_blocked_given_op.register_fake
@affine_blocked_op.register_fake
def _(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


def _run_affine_backward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, scale (zeros without ``x``), shift, residual; empty as of batch norm."""
    return launch.affine_backward(gy, x, y, residual, scale, shift, n, activation, need_x, need_residual)


affine_blocked_backward_op = torch.library.custom_op(
    "clicktrain::affine_blocked_backward", _run_affine_backward, mutates_args=()
)
affine_blocked_backward = plain(affine_blocked_backward_op, _run_affine_backward)


def declared(gy: Tensor, activation: str, need_x: bool, need_residual: bool) -> Four:
    """What the backward operators return, without contents."""
    gx = gy.new_empty(gy.shape if need_x else (0,))
    own = need_residual and Activation.read(activation).number > 0
    gr = gy.new_empty(gy.shape if own else (0,))
    return gx, launch.per_channel(gy), launch.per_channel(gy), gr


@batch_norm2d_blocked_backward_op.register_fake
def _(gy: Tensor, *rest: Any) -> Four:
    return declared(gy, rest[-2], True, rest[-1])


@affine_blocked_backward_op.register_fake
def _(gy: Tensor, *rest: Any) -> Four:
    return declared(gy, *rest[-3:])


def saved_beside(
    activation: str, y: Tensor, residual: Tensor | None, in_place_of_x: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """What the backward pass reads beside the input: the result, what was added, or neither.

    What comes before the activation is computed again from the input, which costs less than to read it. With
    a residual the result is taken where that is enough: the layer behind keeps it as well. It can also stand
    ``in_place_of_x``, where that would not be kept otherwise.
    """
    act = Activation.read(activation)
    if not act.number or (residual is None and not (in_place_of_x and act.by_result)):
        return None, None
    return (y, None) if act.by_result else (None, residual)


def residual_gradient(activation: str, gy: Tensor, gr: Tensor) -> Tensor:
    """The gradient of what was added."""
    return gr if Activation.read(activation).number else gy


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, ctx.n, ctx.eps, ctx.activation = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    beside = saved_beside(ctx.activation, y, residual)
    ctx.save_for_backward(x, *beside, weight, bias, mean, var)


def _backward(ctx: Any, gy: Tensor, *_: Any) -> tuple[Any, ...]:
    return *_gradients(ctx, gy, ctx.needs_input_grad[1:4]), None, None, None


def _gradients(ctx: Any, gy: Tensor, need: Sequence[bool]) -> tuple[Tensor | None, ...]:
    need_weight, need_bias, need_residual = need
    gx, gweight, gbias, gr = batch_norm2d_blocked_backward(
        gy, *ctx.saved_tensors, ctx.n, ctx.eps, ctx.activation, need_residual
    )
    residual = residual_gradient(ctx.activation, gy, gr) if need_residual else None
    return gx, gweight if need_weight else None, gbias if need_bias else None, residual


def _save_given(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, var, weight, bias, residual, ctx.n, ctx.eps, ctx.activation = inputs
    beside = saved_beside(ctx.activation, output, residual)
    ctx.save_for_backward(x, *beside, weight, bias, mean, var)


def _given_backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    need_x, _, _, *need = ctx.needs_input_grad[:6]
    gx, *gradients = _gradients(ctx, gy, need)
    return gx if need_x else None, None, None, *gradients, None, None, None


def _save_affine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, shift, residual, ctx.n, ctx.activation = inputs
    y, added = saved_beside(ctx.activation, output, residual, in_place_of_x=True)
    act = Activation.read(ctx.activation)
    need_x = ctx.needs_input_grad[1] or (act.number > 0 and not act.by_result)
    ctx.save_for_backward(x if need_x else None, y, added, scale, shift)


def _affine_backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    need_x, need_scale, need_shift, need_residual = ctx.needs_input_grad[:4]
    gx, gscale, gshift, gr = affine_blocked_backward(
        gy, *ctx.saved_tensors, ctx.n, ctx.activation, need_x, need_residual
    )
    residual = residual_gradient(ctx.activation, gy, gr) if need_residual else None
    gradients = gx if need_x else None, gscale if need_scale else None, gshift if need_shift else None
    return *gradients, residual, None, None


batch_norm2d_blocked_op.register_autograd(_backward, setup_context=_save)
batch_norm2d_blocked_given_op.register_autograd(_given_backward, setup_context=_save_given)
affine_blocked_op.register_autograd(_affine_backward, setup_context=_save_affine)

batch_norm2d_blocked = differentiable(batch_norm2d_blocked_op, launch.forward, _save, _backward)
batch_norm2d_blocked_given = differentiable(
    batch_norm2d_blocked_given_op, launch.given, _save_given, _given_backward
)
affine_blocked = differentiable(affine_blocked_op, launch.affine, _save_affine, _affine_backward)
