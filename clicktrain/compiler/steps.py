"""Steps: what lowered graphs call in place of layers, on activations in another layout.

A step holds the layer that it stands for and reads parameters, buffers and mode from it at each call, so that
there is nothing to keep in step. Steps live in lowered graphs only, never in the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.compiler.layout_choice import PLAIN
from clicktrain.formats.memory_format import plain, unsafe_in_channels_last
from clicktrain.formats.packed import Structure
from clicktrain.kernels.activations import NONE
from clicktrain.kernels.activations import Activation as Function
from clicktrain.kernels.batch_norm2d import uses_batch_statistics
from clicktrain.kernels.impls import ConvProblem, Impl, Kernels, Phase, positions_of
from clicktrain.kernels.layouts import LAYOUTS
from clicktrain.kernels.max_pool2d import Pooling
from clicktrain.kernels.sparse_conv2d import PackedConv2d
from clicktrain.kernels.sparse_conv2d.dense_gradient import convolution_weight_gradient

Convolution = PackedConv2d | nn.Conv2d


class Enter(nn.Module):
    """Convert images into a layout and into the dtype of its activations; autocast is disabled inside."""

    def __init__(self, convert: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.convert, self.dtype = convert, dtype

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W], any memory format and dtype -> the layout."""
        return self.convert(x.to(self.dtype))


class _Step(nn.Module):
    """Stands for a layer, which is not registered: a lowered graph owns no parameters."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)


class SparseConv(_Step):
    """A convolution by an implementation; a dense one has a structure that keeps everything.

    Its kernels follow a packed layer when its structure is exchanged (masks have moved, or a checkpoint was
    loaded): tables are made again, code stays as long as it covers the patterns. While the gradient of all of
    a packed layer's weights is wanted, that one is computed densely, and nothing else is.
    """

    layer: Convolution
    kernels: Kernels

    bias_later = False
    """Whether its bias is left to the pass behind it, see `Activation`."""

    def __init__(
        self, layer: Convolution, impl: Impl, problem: ConvProblem, tilings: Mapping[Phase, Any]
    ) -> None:
        super().__init__(layer)
        self.impl, self.problem, self.tilings = impl, problem, dict(tilings)
        self.packed = isinstance(layer, PackedConv2d)
        self._prepare(structure_of(layer))

    def _prepare(self, structure: Structure) -> None:
        problem = replace(self.problem, **positions_of(structure))
        self.kernels = self.impl.prepare(structure, problem, self.tilings)
        self.structure = structure

    def forward(self, x: Tensor) -> Tensor:
        """Convolve activations in the layout."""
        arguments = self._arguments(x)
        y = self.kernels.convolve(*arguments)
        if self.packed and self.layer.dense_gradient is not None:
            self._collect(x, y)
        return y

    def with_statistics(self, x: Tensor, n: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """As `forward`, and mean and biased variance [F] of the results of ``n`` images."""
        arguments = self._arguments(x)
        assert self.kernels.with_statistics is not None
        y, mean, var = self.kernels.with_statistics(*arguments, n)
        if self.packed and self.layer.dense_gradient is not None:
            self._collect(x, y)
        return y, (mean, var)

    def folds(self, norm: BatchNorm) -> bool:
        """Whether a batch norm of known statistics, with all that it fuses, can be part of the kernel now."""
        simple = norm.pooling is None and norm.activation in ("none", "relu")
        collecting = self.packed and self.layer.dense_gradient is not None
        return self.kernels.with_affine is not None and simple and not (torch.is_grad_enabled() or collecting)

    def with_norm(self, x: Tensor, norm: BatchNorm, residual: Tensor | None) -> Tensor:
        """``act(bn(conv(x)) + residual)`` in one pass, where it `folds`."""
        x, values, bias, *arguments = self._arguments(x)
        bn = norm.layer
        assert self.kernels.with_affine is not None
        assert bn.running_mean is not None
        assert bn.running_var is not None
        scale = torch.rsqrt(bn.running_var + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight
        shift = (bn.running_mean if bias is None else bn.running_mean - bias) * -scale
        if bn.bias is not None:
            shift = shift + bn.bias
        return self.kernels.with_affine(
            x, values, scale, shift, residual, norm.activation == "relu", *arguments
        )

    @property
    def collects(self) -> bool:
        """Whether the gradient of all weights can be computed in this layout."""
        return not self.packed or self.impl.layout == PLAIN or LAYOUTS[self.impl.layout].images is not None

    def _collect(self, x: Tensor, y: Tensor) -> None:
        layer: Any = self.layer
        images = None if self.impl.layout == PLAIN else LAYOUTS[self.impl.layout].images
        settings = layer.structure.shape, layer.stride, layer.padding, layer.dilation, layer.groups
        x = x.detach()

        @torch.no_grad()
        def weight_gradient(gy: Tensor) -> Tensor:
            own = (x, gy) if images is None else (images(x), images(gy))
            return convolution_weight_gradient(*own, *settings).to(layer.values.dtype)

        layer.collect_from(y, weight_gradient)

    def _arguments(self, x: Tensor) -> tuple[Any, ...]:
        layer: Any = self.layer
        if self.packed and layer.structure is not self.structure:
            self._prepare(layer.structure)
        values = layer.values if self.packed else layer.weight.flatten(1)
        return x, values, None if self.bias_later else layer.bias, *self.kernels.arguments


class DenseConv(_Step):
    """A convolution by PyTorch's dense operator, in the memory format and dtype that a plan asks for."""

    layer: Convolution

    def __init__(self, layer: Convolution, channels_last: bool, bf16: bool) -> None:
        super().__init__(layer)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.bf16 = bf16

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, F, H', W'], in the dtype of the input."""
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


class BatchNorm(_Step):
    """Batch norm in one pass of a layout, perhaps with max pooling before, an addition and an activation."""

    layer: nn.BatchNorm2d

    def __init__(
        self,
        layer: nn.BatchNorm2d,
        run: Callable[..., Tensor],
        activation: Function = NONE,
        pooling: Pooling | None = None,
    ) -> None:
        super().__init__(layer)
        self.run, self.activation, self.pooling = run, str(activation), pooling

    def forward(
        self,
        x: Tensor,
        n: int,
        residual: Tensor | None = None,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Activations of ``n`` images in the layout, and mean and variance if known -> results."""
        return self.run(x, self.layer, n, residual, self.activation, statistics, self.pooling)


class ConvBatchNorm(nn.Module):
    """A convolution and the batch norm behind it, whose statistics it takes on its way in training."""

    def __init__(self, conv: SparseConv, norm: BatchNorm) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor, n: int, residual: Tensor | None = None) -> Tensor:
        """Activations of ``n`` images in the layout -> results in the layout."""
        norm = self.norm
        if not uses_batch_statistics(norm.layer):
            if self.conv.folds(norm):
                return self.conv.with_norm(x, norm, residual)
            return norm.forward(self.conv.forward(x), n, residual)
        y, statistics = self.conv.with_statistics(x, n)
        return norm.forward(y, n, residual, statistics)


class Activation(nn.Module):
    """An activation in one pass of a layout, perhaps with the bias of the convolution before it."""

    def __init__(self, activation: Function, run: Callable[..., Tensor], conv: Convolution | None) -> None:
        super().__init__()
        self.activation, self.run = str(activation), run
        object.__setattr__(self, "conv", conv)

    def forward(self, x: Tensor, n: int) -> Tensor:
        """Activations of ``n`` images in the layout -> the same shape."""
        conv: Any = self.conv
        return self.run(x, n, self.activation, None if conv is None else conv.bias)


class Elementwise(_Step):
    """A layer that never works in place: others may read the value in the layout."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.own = copy.copy(layer)
        if getattr(self.own, "inplace", False):
            self.own.inplace = False  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        y: Tensor = self.own(x)
        return y


class MaxPool(nn.Module):
    """Max pooling. A layer that is set otherwise is lowered again: what follows has other sizes then."""

    def __init__(self, pooling: Pooling, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.pooling, self.run = pooling, run

    def forward(self, x: Tensor) -> Tensor:
        """Activations in the layout -> the largest of each window."""
        return self.run(x, self.pooling)


def in_format(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The value as the model's own code would get it: ``view`` and random numbers depend on the strides."""
    return x.contiguous(memory_format=memory_format)


def structure_of(layer: Convolution) -> Structure:
    """The positions of a layer's weights; a dense layer keeps all."""
    if isinstance(layer, PackedConv2d):
        return layer.structure
    return Structure.from_mask(torch.ones(layer.weight.shape, dtype=torch.bool, device=layer.weight.device))
