"""Packed convolutions of any dimension, transposed ones, and linear layers.

What can be seen as a 2-D convolution (a linear layer is one with 1x1 kernels on 1x1 images, a 1-D convolution
one on images of one row) runs on every implementation of `sparse_conv2d`; the others unpack their weight and
compute densely, so that they save optimizer state, gradients and files, but no time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from clicktrain.formats.packed import Structure
from clicktrain.kernels.sparse_conv2d.api import Padding, Pair, padding_pair, pair
from clicktrain.kernels.sparse_conv2d.packed_layer import PackedLayer

__all__ = ["PackedConv1d", "PackedConv2d", "PackedConv3d", "PackedConvTranspose2d", "PackedLinear"]


class PackedConv2d(PackedLayer):
    """A packed ``nn.Conv2d``: [N, in_channels, H, W] -> [N, F, H', W']."""

    dense = nn.Conv2d
    runs_as_conv2d = True
    settings = ("stride", "padding", "dilation", "groups")
    transposed = False
    output_padding = (0, 0)

    def __init__(
        self,
        structure: Structure,
        values: Tensor,
        bias: Tensor | None = None,
        *,
        stride: Pair = 1,
        padding: Padding = 0,
        dilation: Pair = 1,
        groups: int = 1,
        impl: str = "reference",
    ) -> None:
        super().__init__(structure, values, bias, impl)
        self.out_channels = structure.shape[0]
        self.in_channels = structure.shape[1] * groups
        self.kernel_size = structure.shape[2:]
        self.stride = pair(stride)
        self.padding = padding_pair(padding)
        self.dilation = pair(dilation)
        self.groups = groups
        self.padding_mode = "zeros"

    def as_conv2d(self, shape: Sequence[int]) -> tuple[Any, tuple[int, ...]] | None:
        """Itself, for a batch of images: see `PackedLayer.as_conv2d`."""
        return (self, tuple(shape)) if len(shape) == 4 else None

    def _sizes(self) -> tuple[Any, ...]:
        return self.in_channels, self.out_channels, tuple(self.kernel_size)

    def _compute(self, x: Tensor) -> Tensor:
        if self.collecting:
            return F.conv2d(
                x, self.dense_weight(), self.bias, self.stride, self.padding, self.dilation, self.groups
            )
        return self._run(
            x, self.values, self.structure, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class PackedLinear(PackedLayer):
    """A packed ``nn.Linear``: [..., I] -> [..., O]."""

    dense = nn.Linear
    runs_as_conv2d = True

    def __init__(
        self, structure: Structure, values: Tensor, bias: Tensor | None = None, *, impl: str = "reference"
    ) -> None:
        """Take tensors over: see `PackedLayer`."""
        super().__init__(structure, values, bias, impl)
        self.out_features, self.in_features = structure.shape

    def as_conv2d(self, shape: Sequence[int]) -> tuple[Any, tuple[int, ...]] | None:
        """A 1x1 convolution on 1x1 images: see `PackedLayer.as_conv2d`."""
        twin = PackedConv2d(self.structure.as_conv2d(), self.values, self.bias)
        return twin, (math.prod(shape[:-1]), self.in_features, 1, 1)

    def _sizes(self) -> tuple[Any, ...]:
        return self.in_features, self.out_features

    def _compute(self, x: Tensor) -> Tensor:
        if self.impl == "reference" or self.collecting:
            return F.linear(x, self.dense_weight(), self.bias)
        images = x.reshape(-1, self.in_features, 1, 1)
        structure = self.structure.as_conv2d()
        y = self._run(images, self.values, structure, self.bias, (1, 1), (0, 0), (1, 1), 1)
        return y.reshape(*x.shape[:-1], self.out_features)


class _PackedConvNd(PackedLayer):
    """A packed convolution of another dimension; ``function`` computes it from the dense weight."""

    settings: ClassVar[tuple[str, ...]] = ("stride", "padding", "dilation", "groups")
    function: ClassVar[Callable[..., Tensor]]
    padding_mode = "zeros"
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int

    def __init__(
        self,
        structure: Structure,
        values: Tensor,
        bias: Tensor | None = None,
        *,
        impl: str = "reference",
        **settings: Any,
    ) -> None:
        """Take tensors over: see `PackedLayer`. Settings are those of the dense layer, spelt out."""
        super().__init__(structure, values, bias, impl)
        for key in self.settings:
            setattr(self, key, settings[key])
        outputs, inputs = structure.shape[:2]
        if "output_padding" in self.settings:  # transposed: [inputs, outputs / groups, ...]
            self.in_channels, self.out_channels = outputs, inputs * self.groups
        else:
            self.in_channels, self.out_channels = inputs * self.groups, outputs
        self.kernel_size = structure.shape[2:]

    def _sizes(self) -> tuple[Any, ...]:
        return self.in_channels, self.out_channels, tuple(self.kernel_size)

    def _compute(self, x: Tensor) -> Tensor:
        settings = {key: getattr(self, key) for key in self.settings}
        return type(self).function(x, self.dense_weight(), self.bias, **settings)


class PackedConv1d(_PackedConvNd):
    """A packed ``nn.Conv1d``: [N, in_channels, L] -> [N, F, L']."""

    dense = nn.Conv1d
    runs_as_conv2d = True
    function = F.conv1d

    def as_conv2d(self, shape: Sequence[int]) -> tuple[Any, tuple[int, ...]] | None:
        """A convolution on images of one row: see `PackedLayer.as_conv2d`."""
        if len(shape) != 3:
            return None
        twin = PackedConv2d(self.structure.as_conv2d(), self.values, self.bias, **self._of_one_row())
        return twin, (shape[0], shape[1], 1, shape[2])

    def _of_one_row(self) -> dict[str, Any]:
        padding = self.padding if isinstance(self.padding, str) else (0, self.padding[0])
        stride, dilation = (1, self.stride[0]), (1, self.dilation[0])
        return {"stride": stride, "padding": padding, "dilation": dilation, "groups": self.groups}

    def _compute(self, x: Tensor) -> Tensor:
        if self.impl == "reference" or self.collecting:
            return super()._compute(x)
        images, structure = x.unsqueeze(-2), self.structure.as_conv2d()
        return self._run(images, self.values, structure, self.bias, *self._of_one_row().values()).squeeze(-2)


class PackedConv3d(_PackedConvNd):
    """A packed ``nn.Conv3d``: [N, in_channels, D, H, W] -> [N, F, D', H', W']."""

    dense = nn.Conv3d
    function = F.conv3d


class _PackedConvTranspose(_PackedConvNd):
    """A packed transposed convolution; its weight is [inputs, outputs / groups, *kernel]."""

    settings = ("stride", "padding", "output_padding", "groups", "dilation")
    output_padding: tuple[int, ...]

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """What the dense layer with zeros in place computes; ``output_size`` as there."""
        settings: dict[str, Any] = {key: getattr(self, key) for key in self.settings}
        if output_size is not None:
            like: Any = self  # it reads nothing of it once there is a size
            sizes = like.stride, like.padding, like.kernel_size, len(self.stride), like.dilation
            settings["output_padding"] = _ConvTransposeNd._output_padding(like, x, output_size, *sizes)
        return type(self).function(x, self.dense_weight(), self.bias, **settings)


class PackedConvTranspose1d(_PackedConvTranspose):
    """A packed ``nn.ConvTranspose1d``."""

    dense = nn.ConvTranspose1d
    function = F.conv_transpose1d


class PackedConvTranspose2d(_PackedConvTranspose):
    """A packed ``nn.ConvTranspose2d``."""

    dense = nn.ConvTranspose2d
    function = F.conv_transpose2d


class PackedConvTranspose3d(_PackedConvTranspose):
    """A packed ``nn.ConvTranspose3d``."""

    dense = nn.ConvTranspose3d
    function = F.conv_transpose3d
