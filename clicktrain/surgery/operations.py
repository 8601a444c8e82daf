"""What a node of the graph does, as far as channels are concerned: one word for modules, functions, methods.

``unary``: elementwise; ``dropout``; ``binary``: elementwise with broadcasting; ``pool``: works inside each
channel; ``conv``, ``conv_transpose``, ``linear``, ``norm`` (batch and instance norm), ``prelu``; ``cat``;
``reshape``, ``permute``, ``squeeze``, ``unsqueeze``, ``expand``, ``getitem``, ``reduce``; ``create``
(a tensor of a size that is written out); the layers of
surgery itself (``select``, ``scatter``, ``constant_norm``, ``removed_conv``); ``attribute``, ``input``,
``output``; and ``unknown``.
"""

from __future__ import annotations

import types

from torch import fx, nn

from clicktrain.comm.sync_batch_norm import SYNCHRONIZED
from clicktrain.surgery.layers import ChannelScatter, ChannelSelect, ConstantBatchNorm2d, RemovedConv2d

_WORDS: dict[type[nn.Module], str] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "conv_transpose"),
    nn.Linear: "linear",
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *SYNCHRONIZED), "norm"),
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


_UNARY = (
    "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "sigmoid", "tanh",
    "hardswish", "hardsigmoid", "hardtanh", "softplus", "softsign", "contiguous", "clone", "float",
    "double", "half", "to", "type", "detach", "neg", "abs", "exp", "sqrt", "square", "clamp",
    "clamp_min", "clamp_max", "pow", "rsqrt", "reciprocal", "requires_grad",
)  # fmt: skip
_BINARY = (
    "add", "sub", "mul", "div", "truediv", "iadd", "isub", "imul", "itruediv", "multiply", "divide",
    "subtract", "maximum", "minimum", "rsub",
)  # fmt: skip
_POOL = (
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "interpolate", "upsample", "pad",
)  # fmt: skip
_FUNCTIONS: dict[str, str] = {
    **dict.fromkeys(_UNARY, "unary"),
    **dict.fromkeys(_BINARY, "binary"),
    **dict.fromkeys(_POOL, "pool"),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"), "dropout"),
    **dict.fromkeys(("cat", "concat", "concatenate"), "cat"),
    **dict.fromkeys(("flatten", "reshape", "view", "unflatten"), "reshape"),
    **dict.fromkeys(("permute", "transpose", "movedim"), "permute"),
    **dict.fromkeys(("expand", "expand_as"), "expand"),
    **dict.fromkeys(("new_empty", "new_zeros", "new_ones", "new_full"), "create"),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std"), "reduce"),
    **{name: name for name in ("squeeze", "unsqueeze", "getitem")},
}
_TORCH = ("torch", "_operator", "operator")


def function_kind(node: fx.Node) -> str:
    """The word for a node that calls a function of PyTorch or of Python's operators, or a method."""
    if node.op == "call_method":
        return _FUNCTIONS.get(str(node.target).removesuffix("_"), "unknown")
    target = node.target
    module = str(getattr(target, "__module__", "") or "")
    builtin = isinstance(target, types.BuiltinFunctionType) and not module
    name = str(getattr(target, "__name__", "")).removesuffix("_")
    return _FUNCTIONS.get(name, "unknown") if builtin or module.partition(".")[0] in _TORCH else "unknown"
