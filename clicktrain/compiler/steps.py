"""What lowered graphs call: operations on activations ``[B, C, H, W, V]`` that stand for layers.

A step holds the layer that it stands for and reads parameters, buffers and mode from it at each call, so that
there is nothing to keep in step. Steps live in lowered graphs only, never in the model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.formats.memory_format import plain, unsafe_in_channels_last
from clicktrain.formats.packed import Structure
from clicktrain.kernels.batch_norm2d import batch_norm_blocked, uses_batch_statistics
from clicktrain.kernels.blocked_layout import block_batch, unblock_batch
from clicktrain.kernels.max_pool2d import Pooling, max_pool_blocked
from clicktrain.kernels.sparse_conv2d import PackedConv2d
from clicktrain.kernels.sparse_conv2d.blocked.ops import (
    sparse_conv2d_blocked,
    sparse_conv2d_blocked_statistics,
)
from clicktrain.kernels.sparse_conv2d.blocked.prepared import prepare
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase, Tiling


class Block(nn.Module):
    """Into the layout, in the number type of the region: autocast has no say inside."""

    def __init__(self, lanes: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.lanes, self.dtype = lanes, dtype

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W], any memory format and number type -> [B, C, H, W, V]."""
        y: Tensor = block_batch(x.to(self.dtype), self.lanes)
        return y


class BlockedConv(nn.Module):
    """A convolution in the layout; a dense one by the same operator, with a structure that keeps everything.

    Follows a packed layer when its structure is exchanged (a checkpoint was loaded).

    Attributes:
        text: the plan of the layer's kernels.
    """

    layer: PackedConv2d | nn.Conv2d

    def __init__(
        self, layer: PackedConv2d | nn.Conv2d, image: tuple[int, int], tilings: Mapping[Phase, Tiling]
    ) -> None:
        super().__init__()
        # Not registered: a lowered graph owns no parameters.
        object.__setattr__(self, "layer", layer)
        self.tilings = dict(tilings)
        self.problem = conv_problem(layer, image)
        self._prepare(layer.structure if isinstance(layer, PackedConv2d) else full_structure(layer))

    def _prepare(self, structure: Structure) -> None:
        plan, tables = prepare(structure, self.problem, self.layer.groups, self.tilings)
        self.text, self.tables = plan.to_json(), list(tables.tensors)
        self.structure = structure

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W, V] -> [B, F, H', W', V]."""
        values = self._values()
        y: Tensor = sparse_conv2d_blocked(x, values, self.layer.bias, self.tables, self.text)
        return y

    def with_statistics(self, x: Tensor, n: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As `forward`, and mean and biased variance [F] of the results of ``n`` images."""
        values = self._values()
        y, mean, var = sparse_conv2d_blocked_statistics(x, values, self.layer.bias, self.tables, self.text, n)
        return y, (mean, var)

    def _values(self) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            return layer.weight.flatten(1)
        if layer.structure is not self.structure:
            self._prepare(layer.structure)
        return layer.values


class DenseConv(nn.Module):
    """A convolution by PyTorch's dense operator, in a memory format and number type that a plan asks for."""

    layer: PackedConv2d | nn.Conv2d

    def __init__(self, layer: PackedConv2d | nn.Conv2d, channels_last: bool, bf16: bool) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.bf16 = bf16

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, F, H', W'], in the number type of the input."""
        layer = self.layer
        weight = layer.weight if isinstance(layer, nn.Conv2d) else layer.dense_weight()
        bias = layer.bias
        dtype = x.dtype
        if unsafe_in_channels_last(layer):
            x, weight = plain(x), plain(weight)
        else:
            x = x.contiguous(memory_format=self.format)
            weight = weight.contiguous(memory_format=self.format)
        if self.bf16:
            x, weight = x.bfloat16(), weight.bfloat16()
            bias = None if bias is None else bias.bfloat16()
        y = F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return y.to(dtype) if self.bf16 else y


class BatchNorm(nn.Module):
    """Batch norm, perhaps with an addition and a ReLU, in one pass."""

    layer: nn.BatchNorm2d

    def __init__(self, layer: nn.BatchNorm2d, relu: bool) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)
        self.relu = relu

    def forward(self, x: Tensor, n: int, residual: Tensor | None = None) -> Tensor:
        """[B, C, H, W, V] of ``n`` images -> the same shape."""
        return batch_norm_blocked(x, self.layer, n, residual, self.relu)


class ConvBatchNorm(nn.Module):
    """A convolution and the batch norm behind it, whose statistics are taken on the way in training."""

    def __init__(self, conv: BlockedConv, norm: BatchNorm) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor, n: int, residual: Tensor | None = None) -> Tensor:
        """[B, C, H, W, V] of ``n`` images -> [B, F, H', W', V]."""
        layer = self.norm.layer
        if not uses_batch_statistics(layer):
            y: Tensor = self.norm(self.conv(x), n, residual)
            return y
        y, statistics = self.conv.with_statistics(x, n)
        return batch_norm_blocked(y, layer, n, residual, self.norm.relu, statistics)


class Activation(nn.Module):
    """An activation that never works in place: what lies in the layout may be wanted again."""

    layer: nn.Module

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)
        self.own = copy.copy(layer)
        if getattr(self.own, "inplace", False):
            self.own.inplace = False  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        y: Tensor = self.own(x)
        return y


class MaxPool(nn.Module):
    """Max pooling. A layer that is set otherwise is lowered anew: what follows has other sizes then."""

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W, V] -> [B, C, H', W', V]."""
        return max_pool_blocked(x, self.pooling)


def unblock(x: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Out of the layout, in the number type of the rest: [B, C, H, W, V] -> [n, C, H, W]."""
    y: Tensor = unblock_batch(x, n)
    return y.to(dtype)


def in_format(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The value as the model's own code would get it: ``view`` and random numbers depend on the strides."""
    return x.contiguous(memory_format=memory_format)


def as_images(x: Tensor) -> Tensor:
    """A view that PyTorch's pooling knows: [B, C, H, W, V] -> [B*C, V, H, W], which is channels last."""
    b, c, h, w, v = x.shape
    return x.view(b * c, h, w, v).permute(0, 3, 1, 2)


def as_blocks(y: Tensor, like: Tensor) -> Tensor:
    """Back from `as_images`: [B*C, V, H', W'] -> [B, C, H', W', V]; ``like`` has B and C."""
    _, v, h, w = y.shape
    return y.permute(0, 2, 3, 1).contiguous().view(like.shape[0], like.shape[1], h, w, v)


def image_mean(x: Tensor, n: int, keepdim: bool, dtype: torch.dtype) -> Tensor:
    """Mean over each image: [B, C, H, W, V] -> [n, C, 1, 1] or [n, C]; the filling is dropped."""
    b, c, _, _, v = x.shape
    # In rows, as the model has them: a dropout behind would draw for other places.
    means = x.mean((2, 3), dtype=dtype).permute(0, 2, 1).reshape(b * v, c)[:n].contiguous()
    return means[:, :, None, None] if keepdim else means


def full_structure(layer: nn.Conv2d) -> Structure:
    """The structure of a dense weight: everything is kept."""
    return Structure.from_mask(torch.ones(layer.weight.shape, dtype=torch.bool))


def conv_problem(layer: PackedConv2d | nn.Conv2d, image: tuple[int, int]) -> ConvProblem:
    """The layer on images of [H, W]."""
    return ConvProblem.make(
        layer.in_channels,
        layer.out_channels,
        (layer.kernel_size[0], layer.kernel_size[1]),
        image,
        (layer.stride[0], layer.stride[1]),
        layer.padding if isinstance(layer.padding, str) else (layer.padding[0], layer.padding[1]),
        (layer.dilation[0], layer.dilation[1]),
    )
