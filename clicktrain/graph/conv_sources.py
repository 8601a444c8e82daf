"""Which convolution's filters a fully connected layer reads (Campfire section 2.1.2, Figure 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from clicktrain.graph import TraceError, trace_symbolically

# What keeps the channels apart and in their order: a channel that is constant stays constant.
_MODULES = (
    _BatchNorm, _DropoutNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd, nn.Flatten,
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU,
)  # fmt: skip
_FUNCTIONS = (
    F.relu, torch.relu, F.relu6, F.leaky_relu, F.gelu, F.silu, F.hardswish, F.elu, F.dropout, F.max_pool2d,
    F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.batch_norm, torch.flatten,
)  # fmt: skip
_METHODS = ("relu", "relu_", "flatten", "view", "reshape", "contiguous")
_FLATTEN = (torch.flatten, "flatten", "view", "reshape", "mean", torch.mean)
_SPACE = ({2, 3}, {-1, -2}, {2, -1})
"""Dimensions of a mean that leaves batch and channels."""


class ConvSources(NamedTuple):
    """What could be found out about a network.

    ``sources``: linear layer -> convolution. ``untraced``: why nothing could, "" if the network was followed.
    """

    sources: dict[str, str]
    untraced: str = ""


def conv_sources(model: nn.Module) -> ConvSources:
    """The convolution whose filters a linear layer reads, where nothing mixes the channels between.

    Pooling, normalization, activation and flattening may lie between; after an addition, as in a residual
    network, a zero filter is no zero input, and the layer is left out. So are all layers of a network that
    ``torch.fx`` cannot trace: nothing is eliminated there, and the reason is reported.
    """
    try:
        graph = trace_symbolically(model)
    except TraceError as error:
        return ConvSources({}, str(error))
    modules = dict(model.named_modules())
    sources = {}
    for node in graph.nodes:
        linear = modules.get(str(node.target)) if node.op == "call_module" else None
        if type(linear) is not nn.Linear:
            continue
        source = _back(node.args[0] if node.args else None, modules)
        conv = modules.get(source)
        if isinstance(conv, nn.Conv2d) and linear.in_features % conv.out_channels == 0:
            sources[str(node.target)] = source
    return ConvSources(sources)


def _back(node: object, modules: dict[str, nn.Module]) -> str:
    """Name of the first module on the way up that is none of those listed above; "" if there is none.

    Images must have been made flat on the way: otherwise the inputs are columns, not channels.
    """
    flat = False
    while isinstance(node, fx.Node) and _keeps_channels(node, modules):
        flat |= node.target in _FLATTEN or isinstance(modules.get(str(node.target)), nn.Flatten)
        node = node.args[0] if node.args else None
    return str(node.target) if flat and isinstance(node, fx.Node) and node.op == "call_module" else ""


def _keeps_channels(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules.get(str(node.target)), _MODULES)
    if node.target in ("mean", torch.mean):
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        return isinstance(dims, list | tuple) and set(dims) in _SPACE
    if node.op == "call_function":
        return node.target in _FUNCTIONS
    return node.op == "call_method" and node.target in _METHODS
