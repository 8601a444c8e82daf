"""Generated C in the batch-blocked layout, for a layer alone: images are converted before and after."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from clicktrain.formats.packed import Structure

_Key = tuple[tuple[int, ...], int]
_PREPARED: WeakKeyDictionary[Structure, dict[_Key, tuple[list[Tensor], str]]] = WeakKeyDictionary()
"""Tables and plan of each layer, by problem and groups, for as long as its structure lives."""


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    structure: Structure,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """Arguments as in `sparse_conv2d` of the package, pairs spelt out.

    ``accelerate`` keeps activations blocked from layer to layer and saves the conversions.

    Raises:
        ValueError: not on the CPU, or a dtype other than float32 and float64.
        KernelError: no C compiler, or it fails on a kernel of this layer.
    """
    from clicktrain.kernels.blocked_layout import block_batch, unblock_batch
    from clicktrain.kernels.native import C_TYPES, KernelError, missing_toolchain, toolchain
    from clicktrain.kernels.native.library import need_all
    from clicktrain.kernels.sparse_conv2d.blocked.launch import compile_plan
    from clicktrain.kernels.sparse_conv2d.blocked.ops import sparse_conv2d_blocked
    from clicktrain.kernels.sparse_conv2d.blocked.prepared import prepare
    from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem

    tools = toolchain()
    if tools is None:
        raise KernelError(f"impl='blocked' needs a C compiler, but {missing_toolchain()}")
    if x.device.type != "cpu" or values.device.type != "cpu":
        raise ValueError(f"impl='blocked' runs on the CPU, not on {x.device}: use 'reference' there")
    if values.dtype not in C_TYPES:
        raise ValueError(f"impl='blocked' computes in float32 or float64, not in {values.dtype}")
    images = x if x.dim() == 4 else x[None]
    if torch.is_autocast_enabled("cpu"):
        images = images.to(values.dtype)
    if images.dtype != values.dtype:
        raise ValueError(f"the input is {x.dtype}, the weight {values.dtype}")
    f, c, r, s = structure.shape
    problem = ConvProblem.make(c * groups, f, (r, s), images.shape[2:], stride, padding, dilation)
    prepared = _PREPARED.setdefault(structure, {})
    key = (tuple(problem.numbers()), groups)
    if key not in prepared:
        plan, tables = prepare(structure, problem, groups)
        # All of them now: what cannot be built would else be missed in a backward pass.
        need_all(compile_plan(plan.to_json(), values.dtype))
        prepared[key] = list(tables.tensors), plan.to_json()
    tables_of_layer, text = prepared[key]
    blocks = block_batch(images, tools.lanes(values.dtype))
    y: Tensor = unblock_batch(
        sparse_conv2d_blocked(blocks, values, bias, tables_of_layer, text), images.shape[0]
    )
    return y if x.dim() == 4 else y[0]
