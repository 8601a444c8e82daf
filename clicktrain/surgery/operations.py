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

from torch import fx

from clicktrain.surgery.graph import NetworkGraph
from clicktrain.surgery.layer_kinds import layer_kind

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


def operation(graph: NetworkGraph, node: fx.Node) -> str:
    """The word for a node, see the module's documentation."""
    match node.op:
        case "placeholder":
            return "input"
        case "output":
            return "output"
        case "get_attr":
            return "attribute"
        case "call_module":
            kind = layer_kind(graph.module(node))
            if str(node.target) in graph.kinds:
                return graph.kinds[str(node.target)]
            return "unknown" if kind is None or str(node.target) in graph.opaque else kind
        case "call_method":
            return _FUNCTIONS.get(str(node.target).removesuffix("_"), "unknown")
        case _:
            return _FUNCTIONS.get(_function_name(node), "unknown")


def words(graph: NetworkGraph, node: fx.Node) -> str:
    """A node in the words of the user, for reasons."""
    if node.op == "call_module":
        return f"{node.target} ({type(graph.module(node)).__name__})"
    return (
        str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", node.target))
    )


def _function_name(node: fx.Node) -> str:
    """Name of a function of PyTorch or of Python's operators; empty for others."""
    target = node.target
    module = str(getattr(target, "__module__", "") or "")
    builtin = isinstance(target, types.BuiltinFunctionType) and not module
    name = str(getattr(target, "__name__", ""))
    return name.removesuffix("_") if builtin or module.partition(".")[0] in _TORCH else ""
