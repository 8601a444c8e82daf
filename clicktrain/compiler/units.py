"""Units: the nodes of a graph that can run in another layout, and those that run as one.

A unit is a node, or a batch norm with the max pooling before it and the addition and the activation that
follow it. Everything that is in no unit runs as it was, on ``[N, C, H, W]``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import fx, nn

from clicktrain.compiler.activations import (
    RELU,
    RELU_FUNCTIONS,
    activation_of_function,
    activation_of_layer,
    argument,
)
from clicktrain.formats.memory_format import plain_input
from clicktrain.graph import ModelGraph
from clicktrain.kernels.activations import NONE, Activation
from clicktrain.kernels.layouts import Layout
from clicktrain.kernels.max_pool2d import Pooling
from clicktrain.kernels.sparse_conv2d import PackedConv2d

Kind = Literal["conv", "batch_norm", "elementwise", "pool", "global_pool", "cat"]

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardtanh, nn.Hardswish)
_ELEMENTWISE = (*_ACTIVATIONS, nn.Identity)
"""Not dropout, which would draw other random numbers in another layout."""
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_ELEMENTWISE_FUNCTIONS = (*RELU_FUNCTIONS, F.relu6, F.leaky_relu, F.silu, F.gelu, F.hardswish)
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_POOL_FUNCTIONS = (F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d)


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Nodes that run as one operation, in any layout.

    Attributes:
        name: path of its layer, ``#2`` added for the layer's second call; a function's node name.
        kind: what it does.
        nodes: in the graph's order; the last one's value is the unit's.
        inputs: nodes whose values it reads as images, in the order of its arguments.
        module: its layer, of a fused one the batch norm; None for a function.
        activation: what ends a batch norm, or all that an elementwise unit does; ``none`` for what is another
            operation, or has no kernel.
        pooled: batch norm only: whether the first node is a max pooling.
        pool_layer: that layer, None for a function.
    """

    name: str
    kind: Kind
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    module: nn.Module | None = None
    activation: Activation = NONE
    pooled: bool = False
    pool_layer: nn.Module | None = None

    @property
    def output(self) -> fx.Node:
        """The node whose value is the unit's."""
        return self.nodes[-1]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's value on the example; () if it is no tensor."""
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def dtype_of(unit: Unit) -> torch.dtype:
    """The dtype of a unit's result on the example."""
    dtype: torch.dtype = unit.output.meta["tensor_meta"].dtype
    return dtype


def conv_of(unit: Unit) -> PackedConv2d | nn.Conv2d:
    """The layer of a unit of kind ``conv``."""
    assert isinstance(unit.module, (PackedConv2d, nn.Conv2d))
    return unit.module


def density_of(module: nn.Module | None) -> float:
    """Nonzero weights / all weights of a layer; 1 for what is not packed."""
    return module.structure.density if isinstance(module, PackedConv2d) else 1.0


def find_units(traced: ModelGraph) -> tuple[list[Unit], dict[str, str]]:
    """Units in the graph's order, and the convolutions that are none, each with the reason."""
    finder = _Finder(traced)
    units: dict[fx.Node, Unit] = {}
    for node in reversed(traced.graph.nodes):  # of two batch norms that are added, the later one adds
        unit = finder.batch_norm(node)
        if unit is not None:
            units[unit.output] = unit
    inside = {node for unit in units.values() for node in unit.nodes}
    for node in traced.graph.nodes:
        if node not in inside:
            unit = finder.single(node)
            if unit is not None:
                units[node] = unit
    ordered = [units[node] for node in traced.graph.nodes if node in units]
    return ordered, finder.refused


class _Finder:
    def __init__(self, traced: ModelGraph) -> None:
        self.traced = traced
        self.dtype = packed_type(traced.model)
        self.refused: dict[str, str] = {}
        self._names: dict[fx.Node, str] = {}
        calls: dict[str, int] = {}
        self._taken: set[fx.Node] = set()
        for node in traced.graph.nodes:
            name = node.name
            if node.op == "call_module":
                name = str(node.target)
                calls[name] = calls.get(name, 0) + 1
                if calls[name] > 1:
                    name = f"{name}#{calls[name]}"
            self._names[node] = name

    def batch_norm(self, node: fx.Node) -> Unit | None:
        """(Pooling +) batch norm (+ addition) (+ activation), where nobody else reads what lies between."""
        module = self._module(node)
        if type(module) is not nn.BatchNorm2d or _hooked(module) or not self._images(node):
            return None
        kept = next((t for t in (module.weight, module.running_mean) if t is not None), None)
        x = node.all_input_nodes[0] if node.all_input_nodes else None
        if x is None or not self._images(x) or (kept is not None and kept.dtype != _dtype(node)):
            return None
        nodes, inputs = [node], [x]
        following = self._only_user(node)
        other = None if following is None or following in self._taken else self._added(following, node)
        if following is not None and other is not None:
            nodes.append(following)
            inputs.append(other)
            following = self._only_user(following)
        activation = NONE if following is None else self._activation(following)
        if activation != NONE:
            assert following is not None
            nodes.append(following)
        pooled = x not in self._taken and self._only_user(x) is node and self._is_max_pool(x)
        if pooled:
            nodes.insert(0, x)
            inputs[0] = x.all_input_nodes[0]
        self._taken.update(nodes)
        name = self._names[node]
        layer = self._module(x) if pooled else None
        return Unit(name, "batch_norm", tuple(nodes), tuple(inputs), module, activation, pooled, layer)

    def single(self, node: fx.Node) -> Unit | None:
        module, name = self._module(node), self._names[node]
        if isinstance(module, (PackedConv2d, nn.Conv2d)):
            reason = self._conv_refusal(node, module)
            if reason is not None:
                self.refused[name] = reason
                return None
            return Unit(name, "conv", (node,), (node.all_input_nodes[0],), module)
        inputs = tuple(node.all_input_nodes)
        if node.op not in ("call_module", "call_function", "call_method") or not inputs:
            return None
        kind = self._kind(node, module)
        if (
            kind is None
            or not all(map(self._images, inputs))
            or not (kind == "global_pool" or self._images(node))
        ):
            return None
        return Unit(name, kind, (node,), inputs, module, self._activation(node))

    def _kind(self, node: fx.Node, module: nn.Module | None) -> Kind | None:
        if module is not None:
            if len(node.args) != 1 or node.kwargs or _hooked(module):
                return None
            if type(module) in _ELEMENTWISE:
                return "elementwise"
            if type(module) in _POOLS and not getattr(module, "return_indices", False):
                return "global_pool" if _is_global(module) else "pool"
            return None
        target = node.target
        if node.op == "call_method":
            if target == "mean":
                return "global_pool" if _is_image_mean(node) else None
            if target == "relu":
                return "elementwise"
            return "elementwise" if target == "add" and self._added(node) is not None else None
        if target in _ADD_FUNCTIONS:
            return "elementwise" if self._added(node) is not None else None
        if target in _ELEMENTWISE_FUNCTIONS:
            return "elementwise" if len(node.all_input_nodes) == 1 else None
        if target is torch.mean:
            return "global_pool" if _is_image_mean(node) else None
        if target is F.adaptive_avg_pool2d and argument(node, 1, "output_size") in (1, (1, 1), [1, 1]):
            return "global_pool"
        if target in _POOL_FUNCTIONS:
            return None if node.kwargs.get("return_indices") else "pool"
        if target is torch.cat and argument(node, 1, "dim") in (1, -3):
            return "cat"
        return None

    def _conv_refusal(self, node: fx.Node, module: PackedConv2d | nn.Conv2d) -> str | None:
        if _hooked(module):
            return "it has hooks"
        if isinstance(module, nn.Conv2d):
            if type(module) is not nn.Conv2d or set(module._parameters) != {"weight", "bias"}:
                return "it is no plain Conv2d"
            if module.padding_mode != "zeros":
                return f"padding_mode={module.padding_mode!r}"
            dtype = module.weight.dtype
        else:
            dtype = module.values.dtype
        if len(node.args) != 1 or node.kwargs or not self._images(node) or not self._images(node.args[0]):
            return f"its input is not a batch of images in {str(self.dtype).removeprefix('torch.')}"
        if dtype != _dtype(node):
            return f"its weight is {dtype}"
        return None

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.traced.module(node) if node.op == "call_module" else None

    def _images(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and len(shape_of(node)) == 4 and _dtype(node) is self.dtype

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _added(self, node: fx.Node, one: fx.Node | None = None) -> fx.Node | None:
        """The image of that shape that a node adds to ``one`` (its first argument); None if it adds none."""
        method = node.op == "call_method" and node.target == "add"
        function = node.op == "call_function" and node.target in _ADD_FUNCTIONS
        if not (method or function) or len(node.args) != 2 or node.kwargs:
            return None
        first, second = node.args
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or first is second:
            return None  # sum() begins with the number 0
        one = first if one is None else one
        other = second if first is one else first
        images = self._images(one) and self._images(other)
        return other if images and shape_of(other) == shape_of(node) == shape_of(one) else None

    def _activation(self, node: fx.Node) -> Activation:
        """What a node applies to each number of one image; ``none`` if it does not, or there is no kernel."""
        if len(node.all_input_nodes) != 1:
            return NONE
        module = self._module(node)
        if module is not None:
            hooked = _hooked(module) or len(node.args) != 1 or node.kwargs
            return NONE if hooked else activation_of_layer(module)
        if node.op == "call_method":
            return RELU if node.target == "relu" else NONE
        return activation_of_function(node) if node.op == "call_function" else NONE

    def _is_max_pool(self, node: fx.Node) -> bool:
        unit = self.single(node) if node.op in ("call_module", "call_function") else None
        return unit is not None and unit.kind == "pool" and max_pooling(unit) is not None


_POOLING = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def max_pooling(unit: Unit) -> Pooling | None:
    """The windows of a unit, if it takes maxima over windows that there is a kernel for."""
    node = unit.nodes[0]
    layer = unit.pool_layer if unit.pooled else unit.module
    if isinstance(layer, nn.MaxPool2d):
        pooling = Pooling(*(getattr(layer, name) for name in _POOLING))
    elif isinstance(layer, nn.AdaptiveMaxPool2d) or node.target is F.adaptive_max_pool2d:
        return _equal_windows(shape_of(node.all_input_nodes[0]), shape_of(node))
    elif node.target is F.max_pool2d and len(node.all_input_nodes) == 1:
        given = {name: argument(node, place, name) for place, name in enumerate(_POOLING, 1)}
        pooling = Pooling(**{name: value for name, value in given.items() if value is not None})
    else:
        return None  # another kind, or its sizes are computed and not known here
    return pooling if pooling.fits() else None


def _equal_windows(images: tuple[int, ...], maxima: tuple[int, ...]) -> Pooling | None:
    """The windows of adaptive pooling where all are alike: a graph is for images of one size."""
    sizes = [*zip(images[2:], maxima[2:], strict=True)]
    if any(size % count for size, count in sizes):
        return None
    pooling = Pooling(tuple(size // count for size, count in sizes))
    return pooling if pooling.fits() else None


def pass_of(unit: Unit) -> tuple[str, int] | None:
    """Key of `Layout.sources` for the kernel of a unit, and the number of the activation that ends it.

    None for convolutions and what PyTorch computes.
    """
    if unit.kind == "batch_norm":
        return ("pooled_norm" if unit.pooled else "batch_norm"), unit.activation.number
    if unit.kind == "elementwise" and unit.activation != NONE:
        return "batch_norm", unit.activation.number
    return ("max_pool", 0) if unit.kind == "pool" and max_pooling(unit) is not None else None


def runs_in(unit: Unit, layout: Layout) -> bool:
    """Whether a layout has an operation for a unit; convolutions ask their implementations."""
    if unit.kind == "batch_norm":
        return layout.batch_norm is not None
    if unit.kind == "pool":
        own = layout.max_pool is not None and max_pooling(unit) is not None
        return own or layout.view is not None
    if unit.kind == "global_pool":
        return layout.image_mean is not None
    return unit.kind != "cat" or layout.channels_second


def packed_type(model: nn.Module) -> torch.dtype:
    """The dtype of a network's packed layers: accelerated regions have one."""
    packed = (m.values.dtype for m in model.modules() if isinstance(m, PackedConv2d))
    return next(packed, torch.float32)


def modules_in(units: list[Unit], traced: ModelGraph) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules that units stand for."""
    for unit in units:
        for node in unit.nodes:
            if node.op == "call_module":
                yield str(node.target), traced.module(node)


def watched(module: nn.Module) -> bool:
    """Whether hooks watch the module's calls: then it has to be called."""
    return bool(
        module._forward_hooks
        or any(hook is not plain_input for hook in module._forward_pre_hooks.values())
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _hooked(module: nn.Module) -> bool:
    return watched(module) or "forward" in module.__dict__


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("tensor_meta"), "dtype", None)


def _is_global(module: nn.Module) -> bool:
    return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1), [1, 1])


def _is_image_mean(node: fx.Node) -> bool:
    dims = argument(node, 1, "dim")
    if not isinstance(dims, (tuple, list)) or not all(isinstance(d, int) for d in dims):
        return False
    return len(node.args) <= 3 and sorted(d % 4 for d in dims) == [2, 3] and "dtype" not in node.kwargs
