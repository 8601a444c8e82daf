"""One `LayerAdapter` per layer type: how pruning sees a layer, whatever shape its weight has.

A method computes on views [F, C, R, S]: filters (outputs), channels per group (inputs), kernel rows and
columns. The adapter of a layer's type turns a tensor of the weight's own shape into that view and back, says
which units of sparsity have a meaning, which axis is which, and how often the layer uses each weight.

A layer whose type, or a parent whose computation it shares, is registered can be pruned; every other layer is
left alone, and fixes the channels that it touches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from clicktrain.sparsity.patterns import MAX_POSITIONS

View: TypeAlias = tuple[int, int, int, int]

UNITS = ("weight", "kernel", "pattern", "channel")
"""What may be pruned of a layer: single weights, whole kernels [f, c], positions inside of kernels (each
kernel keeps one of a few patterns), and filters or input channels."""


class LayerAdapter:
    """A layer whose weight is [outputs, inputs / groups, *kernel], as convolutions and linear layers have it.

    A type that stores its weight otherwise overrides `view`, `unview`, the axes and `weight_uses`.

    Attributes:
        layer: the layer's class; subclasses that do not compute otherwise are seen in the same way.
        kind: "conv" counts in the compression ratio over convolution weights, "linear" does not.
        forward: methods of ``layer`` that have to be its own for the weight to be used as it is.
        out_axis, in_axis: axes of the weight that outputs and inputs lie along.
    """

    out_axis = 0
    in_axis = 1

    def __init__(
        self,
        layer: type[nn.Module],
        kind: Literal["conv", "linear"] = "conv",
        forward: Sequence[str] = ("forward",),
    ) -> None:
        self.layer, self.kind, self.forward = layer, kind, tuple(forward)

    def weight(self, module: nn.Module) -> Tensor:
        """The weight, a parameter that the layer holds as ``weight``."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight

    def groups(self, module: nn.Module) -> int:
        """Groups of channels that do not see each other."""
        groups: Any = getattr(module, "groups", 1)
        return int(groups)

    def depthwise(self, module: nn.Module) -> bool:
        """Whether every filter reads one input channel of its own."""
        groups = self.groups(module)
        return groups > 1 and self.view_shape(module)[1] == 1

    def view_shape(self, module: nn.Module) -> View:
        """(F, C, R, S) of the weight's view."""
        f, c, r, s = self.view(module, torch.empty(self.weight_shape(module), device="meta")).shape
        return f, c, r, s

    def weight_shape(self, module: nn.Module) -> tuple[int, ...]:
        """Shape of the weight; of a packed layer's dense one, which is not built for it."""
        structure = getattr(module, "structure", None)
        return tuple((self.weight(module) if structure is None else structure).shape)

    def view(self, module: nn.Module, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as [F, C, R, S].

        Kernels of one dimension are one row, those of three [depth * rows, columns]; without a kernel R and S
        are 1. Shares memory unless the layer has its channels in another order, and is differentiable.
        """
        f, c, *kernel = tensor.shape
        return tensor.reshape(f, c, math.prod(kernel[:-1]), kernel[-1] if kernel else 1)

    def unview(self, module: nn.Module, tensor: Tensor) -> Tensor:
        """The inverse of `view`: [F, C, R, S] -> the weight's shape."""
        return tensor.reshape(self.weight_shape(module))

    def unit_refusal(self, module: nn.Module, unit: str) -> str | None:
        """Why a unit of `UNITS` has no meaning in this layer; None if it has one."""
        _, channels, r, s = self.view_shape(module)
        if unit == "pattern" and r * s == 1:
            return "its kernels have one position"
        if unit == "pattern" and r * s > MAX_POSITIONS:
            return f"its kernels have more than {MAX_POSITIONS} positions"
        if unit == "kernel" and channels == 1:
            return "its filters have one kernel each: remove channels instead"
        return None

    def weight_uses(self, module: nn.Module, x: Tensor, y: Tensor) -> tuple[tuple[int, ...], int]:
        """Size of the output in space, and how often a pass from x to y uses each weight, over the batch."""
        dims = self.weight(module).dim() - 2
        if dims == 0:
            return (), y.numel() // max(self.weight(module).shape[self.out_axis], 1)
        return tuple(y.shape[-dims:]), y.numel() // y.shape[-dims - 1]

    def own_forward(self, module: nn.Module) -> bool:
        """Whether the layer does not compute as the registered class; see `layer_trial`."""
        own = type(module)
        return any(getattr(own, name) is not getattr(self.layer, name) for name in self.forward)


class _TransposedConv(LayerAdapter):
    """A weight [inputs, outputs / groups, *kernel]."""

    out_axis = 1
    in_axis = 0

    def view(self, module: nn.Module, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as [F, C, R, S]; a copy where the layer has groups."""
        groups = self.groups(module)
        inputs, outputs, *kernel = tensor.shape
        grouped = tensor.reshape(groups, inputs // groups, outputs, math.prod(kernel[:-1]), kernel[-1])
        return grouped.transpose(1, 2).flatten(0, 1)

    def unview(self, module: nn.Module, tensor: Tensor) -> Tensor:
        """The inverse of `view`: [F, C, R, S] -> the weight's shape."""
        groups = self.groups(module)
        grouped = tensor.reshape(groups, tensor.shape[0] // groups, *tensor.shape[1:])
        return grouped.transpose(1, 2).reshape(self.weight_shape(module))

    def weight_uses(self, module: nn.Module, x: Tensor, y: Tensor) -> tuple[tuple[int, ...], int]:
        """Once per position of the input: see `LayerAdapter.weight_uses`."""
        dims = self.weight(module).dim() - 2
        return tuple(y.shape[-dims:]), x.numel() // x.shape[-dims - 1]


ADAPTERS: dict[type[nn.Module], LayerAdapter] = {}
"""Layer class -> its adapter."""


def register_layer(adapter: LayerAdapter) -> LayerAdapter:
    """Make a layer type prunable; the newest adapter of a class counts."""
    ADAPTERS[adapter.layer] = adapter
    return adapter


def nearest_adapter(module: nn.Module) -> LayerAdapter | None:
    """The adapter of a layer's class or of its nearest registered parent; None if nobody knows the type."""
    return next((ADAPTERS[kind] for kind in type(module).__mro__ if kind in ADAPTERS), None)


def dense_adapter(module: nn.Module) -> LayerAdapter | None:
    """As `nearest_adapter`, also for a packed layer: the adapter of the dense layer that it was."""
    dense = getattr(type(module), "dense", None)
    return ADAPTERS.get(dense) if isinstance(dense, type) else nearest_adapter(module)


def adapter_of(module: nn.Module) -> LayerAdapter | None:
    """As `nearest_adapter`, but None too for a layer with a forward of its own."""
    adapter = nearest_adapter(module)
    return None if adapter is None or adapter.own_forward(module) else adapter


for _conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register_layer(LayerAdapter(_conv, forward=("forward", "_conv_forward")))
for _conv_transpose in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
    register_layer(_TransposedConv(_conv_transpose))
register_layer(LayerAdapter(nn.Linear, kind="linear"))
