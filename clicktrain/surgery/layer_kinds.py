"""Layers whose channels are understood, by one word each; see `operations`."""

from __future__ import annotations

from torch import nn

from clicktrain.surgery.layers import ChannelScatter, ChannelSelect, ConstantBatchNorm2d, RemovedConv2d

_WORDS: dict[type[nn.Module], str] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "conv_transpose"),
    nn.Linear: "linear",
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), "norm"),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), "norm"),
    **dict.fromkeys((nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU), "unary"),
    **dict.fromkeys((nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh), "unary"),
    **dict.fromkeys((nn.Softplus, nn.Softsign, nn.Identity), "unary"),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), "dropout"),
    nn.PReLU: "prelu",
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), "pool"),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), "pool"),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), "pool"),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), "pool"),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad2d), "pool"),
    nn.Flatten: "reshape",
    ChannelScatter: "scatter",
    ChannelSelect: "select",
    ConstantBatchNorm2d: "constant_norm",
    RemovedConv2d: "removed_conv",
}
_METHODS = ("forward", "_conv_forward", "__call__", "_call_impl")


def layer_kind(module: nn.Module) -> str | None:
    """The word for a layer; None if it is not known.

    A subclass is what its parent is as long as it computes as that does.
    """
    for kind in type(module).__mro__:
        if kind in _WORDS:
            same = all(getattr(type(module), m, None) is getattr(kind, m, None) for m in _METHODS)
            own = "forward" in module.__dict__  # replaced on the object
            return _WORDS[kind] if same and not own and not computed(module) else None
    return None


def parent_kind(module: nn.Module) -> type[nn.Module] | None:
    """The known layer that a layer with a ``forward`` of its own is derived from; None if there is none."""
    for kind in type(module).__mro__:
        if kind in _WORDS:
            plain = kind is not type(module) and "forward" not in module.__dict__ and not computed(module)
            return kind if plain else None
    return None


def word_of(kind: type[nn.Module]) -> str:
    """The word for a known layer's class."""
    return _WORDS[kind]


def computed(module: nn.Module) -> bool:
    """Whether a layer's weight is computed at each access (weight norm, parametrizations)."""
    # The attribute itself is not asked for: while a model is traced that would be part of its graph.
    if "weight" in module._parameters:
        return False
    return "weight" in module.__dict__ or isinstance(getattr(type(module), "weight", None), property)
