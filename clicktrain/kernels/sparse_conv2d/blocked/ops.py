"""The operators that PyTorch sees: one boundary per layer and direction, with shapes and gradients declared.

They work under autograd, ``torch.compile`` and ``torch.export``. What is registered has a name in ``_op``;
under the plain name it is called without the dispatcher where that makes no difference
(`clicktrain.kernels.direct`). Tables travel as tensors, the plan as text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clicktrain.kernels.direct import differentiable, plain
from clicktrain.kernels.native import compute_type
from clicktrain.kernels.sparse_conv2d.autograd import gradients
from clicktrain.kernels.sparse_conv2d.blocked import launch
from clicktrain.kernels.sparse_conv2d.blocked.prepared import ConvPlan


@torch.library.custom_op("clicktrain::sparse_conv2d_blocked", mutates_args=())
def sparse_conv2d_blocked_op(
    x: Tensor, values: Tensor, bias: Tensor | None, tables: list[Tensor], plan: str
) -> Tensor:
    """Convolve with a packed weight in the blocked layout: ClickTrain section 5.2.

    Args:
        x: [B, C, H, W, V], float32, float64 or bfloat16, V the vector lanes of what that is computed in.
        values: packed weights, shape ``structure.values_shape``, with the dtype of ``x``; float32 for
            bfloat16, as are bias and the gradients of both.
        bias: [F] or None.
        tables: of the layer, as `prepared.prepare` makes them.
        plan: ``ConvPlan.to_json()`` of the layer.

    Returns:
        [B, F, H', W', V] with the dtype of ``x``.
    """
    return launch.forward(x, values, bias, tables, plan)


@sparse_conv2d_blocked_op.register_fake
def _(x: Tensor, values: Tensor, bias: Tensor | None, tables: list[Tensor], plan: str) -> Tensor:
    return x.new_empty(launch.output_shape(x, ConvPlan.from_json(plan).problem))


@torch.library.custom_op("clicktrain::sparse_conv2d_blocked_statistics", mutates_args=())
def sparse_conv2d_blocked_statistics_op(
    x: Tensor, values: Tensor, bias: Tensor | None, tables: list[Tensor], plan: str, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sparse_conv2d_blocked`, and what a batch norm behind it wants to know, taken on the way.

    Returns:
        The convolution's result [B, F, H', W', V]; its mean and biased variance [F] over n x H' x W' numbers
        of n images. Gradients do not come back through these: ``batch_norm2d_blocked_given`` knows that.
    """
    return launch.forward_statistics(x, values, bias, tables, plan, n)


@sparse_conv2d_blocked_statistics_op.register_fake
def _(
    x: Tensor, values: Tensor, bias: Tensor | None, tables: list[Tensor], plan: str, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    problem = ConvPlan.from_json(plan).problem
    y = x.new_empty(launch.output_shape(x, problem))
    return y, values.new_empty(problem.filters), values.new_empty(problem.filters)


@torch.library.custom_op("clicktrain::sparse_conv2d_blocked_dgrad", mutates_args=())
def sparse_conv2d_blocked_dgrad_op(gy: Tensor, values: Tensor, tables: list[Tensor], plan: str) -> Tensor:
    """Gradient w.r.t. the input: [B, F, H', W', V] -> [B, C, H, W, V]."""
    return launch.dgrad(gy, values, tables, plan)


@sparse_conv2d_blocked_dgrad_op.register_fake
def _(gy: Tensor, values: Tensor, tables: list[Tensor], plan: str) -> Tensor:
    problem = ConvPlan.from_json(plan).problem
    return gy.new_empty(gy.shape[0], problem.channels, problem.rows.size, problem.columns.size, gy.shape[4])


@torch.library.custom_op("clicktrain::sparse_conv2d_blocked_wgrad", mutates_args=())
def sparse_conv2d_blocked_wgrad_op(
    x: Tensor, gy: Tensor, values_shape: list[int], tables: list[Tensor], plan: str
) -> Tensor:
    """Gradient of the packed values, at the kept positions only. Padding lanes of ``gy`` have to be zero."""
    return launch.wgrad(x, gy, values_shape, tables, plan)


@sparse_conv2d_blocked_wgrad_op.register_fake
def _(x: Tensor, gy: Tensor, values_shape: list[int], tables: list[Tensor], plan: str) -> Tensor:
    return x.new_empty(values_shape, dtype=compute_type(x.dtype))


sparse_conv2d_blocked_dgrad = plain(sparse_conv2d_blocked_dgrad_op, launch.dgrad)
sparse_conv2d_blocked_wgrad = plain(sparse_conv2d_blocked_wgrad_op, launch.wgrad)


_GRADIENTS = gradients(sparse_conv2d_blocked_dgrad, sparse_conv2d_blocked_wgrad, (0, 2, 3, 4))
sparse_conv2d_blocked_op.register_autograd(_GRADIENTS.backward, setup_context=_GRADIENTS.save)
sparse_conv2d_blocked_statistics_op.register_autograd(_GRADIENTS.backward, setup_context=_GRADIENTS.save)
sparse_conv2d_blocked = differentiable(
    sparse_conv2d_blocked_op, launch.forward, _GRADIENTS.save_directly, _GRADIENTS.backward
)
sparse_conv2d_blocked_statistics = differentiable(
    sparse_conv2d_blocked_statistics_op,
    launch.forward_statistics,
    _GRADIENTS.save_directly,
    _GRADIENTS.backward,
)
