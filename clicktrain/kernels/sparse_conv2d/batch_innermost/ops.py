"""The operators that PyTorch sees: one boundary per layer and direction, with shapes and gradients declared.

As `clicktrain.kernels.sparse_conv2d.blocked.ops`, on ``[C, H, W, N]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clicktrain.kernels.direct import differentiable, plain
from clicktrain.kernels.sparse_conv2d.autograd import gradients
from clicktrain.kernels.sparse_conv2d.batch_innermost import launch
from clicktrain.kernels.sparse_conv2d.batch_innermost.plan import ConvPlan


@torch.library.custom_op("clicktrain::sparse_conv2d_batch_innermost", mutates_args=())
def sparse_conv2d_batch_innermost_op(
    x: Tensor, values: Tensor, bias: Tensor | None, tables: list[Tensor], plan: str
) -> Tensor:
    """Convolve with a packed weight in the batch-innermost layout: ClickTrain section 5.2.

    Args:
        x: [C, H, W, N], float32, float64, bfloat16 or float16.
        values: packed weights, shape ``structure.values_shape``; of the dtype of ``x``, or float32 beside one
        of
            16 bits, as are bias and the gradients of both. They are multiplied in the dtype of ``x``.
        bias: [F] or None.
        tables, plan: of the layer, as `plan.make_plan` makes them.

    Returns:
        [F, H', W', N] with the dtype of ``x``.
    """
    return launch.forward(x, values, bias, tables, plan)


@sparse_conv2d_batch_innermost_op.register_fake
def _(x: Tensor, values: Tensor, bias: Tensor | None, tables: list[Tensor], plan: str) -> Tensor:
    return x.new_empty(launch.output_shape(x, ConvPlan.from_json(plan).problem))


@torch.library.custom_op("clicktrain::sparse_conv2d_batch_innermost_statistics", mutates_args=())
def sparse_conv2d_batch_innermost_statistics_op(
    x: Tensor, values: Tensor, bias: Tensor | None, tables: list[Tensor], plan: str, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sparse_conv2d_batch_innermost`, and mean and biased variance [F] of its results, taken on the way.

    Gradients do not come back through the statistics: the batch norm behind knows that.
    """
    return launch.forward_statistics(x, values, bias, tables, plan, n)


@sparse_conv2d_batch_innermost_statistics_op.register_fake
def _(
    x: Tensor, values: Tensor, bias: Tensor | None, tables: list[Tensor], plan: str, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    problem = ConvPlan.from_json(plan).problem
    y = x.new_empty(launch.output_shape(x, problem))
    return y, values.new_empty(problem.filters), values.new_empty(problem.filters)


@torch.library.custom_op("clicktrain::sparse_conv2d_batch_innermost_affine", mutates_args=())
def sparse_conv2d_batch_innermost_affine_op(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    tables: list[Tensor],
    plan: str,
) -> Tensor:
    """``act(conv(x) * scale + shift + residual)`` in one pass, for a batch norm of known statistics.

    There are no gradients.

    Args:
        scale, shift: [F], of the dtype of ``values``.
        residual: like the result, or None.
        relu: whether negative results become zero.
    """
    return launch.affine(x, values, scale, shift, residual, relu, tables, plan)


@sparse_conv2d_batch_innermost_affine_op.register_fake
def _(
    x: Tensor,
    values: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    relu: bool,
    tables: list[Tensor],
    plan: str,
) -> Tensor:
    return x.new_empty(launch.output_shape(x, ConvPlan.from_json(plan).problem))


@torch.library.custom_op("clicktrain::sparse_conv2d_batch_innermost_dgrad", mutates_args=())
def sparse_conv2d_batch_innermost_dgrad_op(
    gy: Tensor, values: Tensor, tables: list[Tensor], plan: str
) -> Tensor:
    """Gradient w.r.t. the input: [F, H', W', N] -> [C, H, W, N]."""
    return launch.dgrad(gy, values, tables, plan)


@sparse_conv2d_batch_innermost_dgrad_op.register_fake
def _(gy: Tensor, values: Tensor, tables: list[Tensor], plan: str) -> Tensor:
    problem = ConvPlan.from_json(plan).problem
    return gy.new_empty(problem.channels, *problem.image, gy.shape[3])


@torch.library.custom_op("clicktrain::sparse_conv2d_batch_innermost_wgrad", mutates_args=())
def sparse_conv2d_batch_innermost_wgrad_op(
    x: Tensor, gy: Tensor, values_shape: list[int], tables: list[Tensor], plan: str
) -> Tensor:
    """Gradient w.r.t. the packed values, at the kept positions only; float32, of float64 ``x`` float64."""
    return launch.wgrad(x, gy, values_shape, tables, plan)


@sparse_conv2d_batch_innermost_wgrad_op.register_fake
def _(x: Tensor, gy: Tensor, values_shape: list[int], tables: list[Tensor], plan: str) -> Tensor:
    return x.new_empty(values_shape, dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)


sparse_conv2d_batch_innermost_dgrad = plain(sparse_conv2d_batch_innermost_dgrad_op, launch.dgrad)
sparse_conv2d_batch_innermost_wgrad = plain(sparse_conv2d_batch_innermost_wgrad_op, launch.wgrad)
sparse_conv2d_batch_innermost_affine = plain(sparse_conv2d_batch_innermost_affine_op, launch.affine)


_GRADIENTS = gradients(sparse_conv2d_batch_innermost_dgrad, sparse_conv2d_batch_innermost_wgrad, (1, 2, 3))
sparse_conv2d_batch_innermost_op.register_autograd(_GRADIENTS.backward, setup_context=_GRADIENTS.save)
sparse_conv2d_batch_innermost_statistics_op.register_autograd(
    _GRADIENTS.backward, setup_context=_GRADIENTS.save
)
sparse_conv2d_batch_innermost = differentiable(
    sparse_conv2d_batch_innermost_op, launch.forward, _GRADIENTS.save_directly, _GRADIENTS.backward
)
sparse_conv2d_batch_innermost_statistics = differentiable(
    sparse_conv2d_batch_innermost_statistics_op,
    launch.forward_statistics,
    _GRADIENTS.save_directly,
    _GRADIENTS.backward,
)
