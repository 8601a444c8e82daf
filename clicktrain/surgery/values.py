"""What is known of every channel's value without data: whether it depends on the input, and its constant.

A channel whose filter is zero is not zero behind its batch norm: it is beta while training and
``beta - gamma * mean / sqrt(var + eps)`` in evaluation, and behind a zero-padded convolution not even the
same at the borders. PruneTrain says that zeroed channels "remain zero after normalization" (4.2); here that
is worked out, and a channel counts as zero only if it is.

For every channel: ``center`` [2, n], its value while training and in evaluation; ``radius`` [n], how far it
can be from there; ``dead`` [n], whether it carries nothing of the input: all weights on the way are under the
threshold (the paper's maximum of absolute values, figure 4). A dead channel need not be close to its center:
a batch norm makes small weights large again, and only weights of exactly zero are safe from that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from clicktrain.graph import working_copy
from clicktrain.surgery.flow import calling
from clicktrain.surgery.groups import Dependencies
from clicktrain.surgery.operations import layer_kind
from clicktrain.surgery.steady import steadily

_ANY = 1e9
"""Radius of what depends on the input: stands for infinity, but zero times it is zero."""


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """Bounds on the values of n channels: ``center`` [2, n], ``radius`` [n], ``dead`` [n]; see above."""

    center: Tensor
    radius: Tensor
    dead: Tensor

    @property
    def size(self) -> Tensor:
        """[n]: bound on the absolute value."""
        return self.center.abs().amax(0) + self.radius

    def take(self, index: Tensor) -> Value:
        """Channels by their numbers."""
        return Value(self.center[:, index], self.radius[index], self.dead[index])


@dataclass(frozen=True, slots=True, eq=False)
class Edge:
    """A layer that reads channels: what arrives, and which its weights are under the threshold for."""

    node: fx.Node
    value: Value
    unread: Tensor


class Values:
    """Values of all nodes with channels, and all edges where layers with weights read them.

    Attributes:
        edges: convolutions (depthwise ones pass channels through, and are none) and linear layers.
        contribution: for convolutions, [F]: bound on what the weights make of the input, without the bias.
    """

    def __init__(self, deps: Dependencies, threshold: float) -> None:
        self._found, self._graph, self._threshold = deps, deps.graph, threshold
        self.of: dict[fx.Node, Value] = {}
        self.edges: list[Edge] = []
        self.contribution: dict[fx.Node, Tensor] = {}
        rules: dict[str, Callable[[fx.Node, int], Value | None]] = {
            "norm": self._norm,
            "constant_norm": self._norm,
            "binary": self._binary,
            "cat": self._cat,
            "removed_conv": self._removed_conv,
        }
        reading: dict[str, Callable[[fx.Node, int, Value], Value | None]] = {
            **dict.fromkeys(("conv", "conv_transpose", "linear"), self._conv),
            **dict.fromkeys(("unary", "prelu"), self._unary),
            "dropout": self._dropout,
            "pool": self._pool,
            "select": self._select,
            "scatter": self._scatter,
            "reduce": self._reduce,
            **dict.fromkeys(("reshape", "permute", "squeeze", "unsqueeze", "expand", "getitem"), self._same),
        }
        with torch.no_grad():
            for node in self._graph.all_nodes:
                if node in deps.flow.channels:
                    n, word = len(deps.flow.channels[node].ids), self._graph.operation(node)
                    known, x = None, self._from(node)
                    if node in deps.flow.per_channel:
                        known = self._per_channel(node, n)
                    elif node not in deps.flow.unclear:
                        if word in rules:
                            known = rules[word](node, n)
                        elif word in reading and x is not None:
                            known = reading[word](node, n, x)
                    self.of[node] = known or _alive(n)

    def _from(self, node: fx.Node) -> Value | None:
        return self.of.get(node.all_input_nodes[0]) if node.all_input_nodes else None

    def _conv(self, node: fx.Node, n: int, x: Value) -> Value | None:
        module: Any = self._graph.module(node)
        weight = module.weight.detach().double().cpu()
        if self._graph.operation(node) == "conv_transpose":
            weight, padded = weight.transpose(0, 1), True
        else:
            padded = getattr(module, "padding", 0) not in (0, (0,), (0, 0), (0, 0, 0), "valid")
            padded |= layer_kind(module) is None  # a forward of its own may pad
        groups = getattr(module, "groups", 1)
        # [G, F / G, C / G] of sums, absolute sums and maxima over the kernel.
        flat = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        total, absolute, largest = flat.sum(-1), flat.abs().sum(-1), flat.abs().amax(-1)
        if x.dead.numel() != groups * weight.shape[1]:
            return None
        center = x.center.view(2, groups, 1, -1)
        # A constant through zero padding is another number at the border.
        border = center.abs().amax(0) if padded else torch.zeros(())
        radius = (absolute * (x.radius.view(groups, 1, -1) + border)).sum(-1).reshape(-1)
        result = torch.zeros(2, n) if padded else (total * center).sum(-1).reshape(2, -1)
        small = largest <= self._threshold
        dead = (small | x.dead.view(groups, 1, -1)).all(-1).reshape(-1)
        self.contribution[node] = radius + result.abs().amax(0)
        if not (groups > 1 and weight.shape[1] == 1):
            self.edges.append(Edge(node, x, small.all(1).reshape(-1)))
        if module.bias is not None:
            result = result + module.bias.detach().double().cpu()
        return Value(result.double(), radius.clamp(max=_ANY), dead)

    def _norm(self, node: fx.Node, n: int) -> Value | None:
        module: Any = self._graph.module(node)
        x = self._from(node)
        if self._graph.operation(node) == "constant_norm" and (x is None or x.dead.numel() != n):
            x = _constant(torch.zeros(n))
        if x is None:
            return None
        gamma, beta = (
            torch.full((n,), default) if tensor is None else tensor.detach().double().cpu()
            for tensor, default in ((module.weight, 1.0), (module.bias, 0.0))
        )
        spread = gamma.abs() * x.radius / module.eps**0.5
        trained = evaluated = beta.double()
        if module.running_mean is not None:
            scale = gamma / (module.running_var.double().cpu() + module.eps).sqrt()
            evaluated = beta + (x.center[1] - module.running_mean.double().cpu()) * scale
            spread = torch.maximum(spread, scale.abs() * x.radius)
        dead = x.dead | (gamma.abs() <= self._threshold)
        return Value(torch.stack((trained, evaluated)), spread.clamp(max=_ANY), dead)

    def _unary(self, node: fx.Node, n: int, x: Value) -> Value | None:
        center, low, high = (
            self._evaluate(node, v) for v in (x.center, x.center - x.radius, x.center + x.radius)
        )
        if center is None or low is None or high is None:
            return None
        # Most are monotone; SiLU and its like are but for a dip of less than 0.4.
        radius = torch.maximum((low - center).abs(), (high - center).abs()).amax(0) + x.radius.clamp(max=0.4)
        return Value(center.nan_to_num(0.0), radius.nan_to_num(_ANY).clamp(max=_ANY), x.dead)

    def _evaluate(self, node: fx.Node, x: Tensor) -> Tensor | None:
        """An elementwise operation on numbers of ours."""
        if len(node.all_input_nodes) > 1 or node.args[:1] != (node.all_input_nodes[0],):
            return None
        if str(node.target) in _KEEPS_VALUES:
            return x
        if node.op == "call_module":
            module = self._graph.module(node)
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor):  # PReLU, in whatever dtype and on whatever device
                return torch.where(x > 0, x, x * weight.detach().double().cpu())
            result = type(module).forward(module, x.clone())
        elif node.op == "call_method":
            result = getattr(x.clone(), str(node.target))(*node.args[1:], **node.kwargs)
        else:
            assert callable(node.target)
            result = node.target(x.clone(), *node.args[1:], **node.kwargs)
        return result if isinstance(result, Tensor) else None

    def _per_channel(self, node: fx.Node, n: int) -> Value | None:
        """Something that works inside each channel: of a constant it is tried what it makes."""
        sources = [self.of[source] for source in node.all_input_nodes if self.of[source].dead.numel() == n]
        if len(sources) != len(node.all_input_nodes):
            return None
        dead = torch.stack([source.dead for source in sources]).all(0)
        exact = torch.stack([source.radius == 0 for source in sources]).all(0)
        made = [self._of_constants(node, sources, training) for training in (True, False)]
        if made[0] is None or made[1] is None:
            return _unknown(dead)
        return _where_exact(torch.stack([made[0], made[1]]), exact, dead)

    def _of_constants(self, node: fx.Node, sources: list[Value], training: bool) -> Tensor | None:
        """[n]: what comes out where all pixels of a channel are the same; not a number where they differ."""
        inputs = []
        for source, value in zip(node.all_input_nodes, sources, strict=True):
            shape = self._graph.shapes[source]
            dim = self._found.flow.channels[source].dim
            view = [1] * len(shape)
            view[dim] = shape[dim]
            inputs.append(value.center[0 if training else 1].view(view).expand(shape).clone())
        try:
            with steadily(()):
                if node.op == "call_module":
                    twin = working_copy(self._graph.module(node)).double().cpu()
                    for module in twin.modules():
                        module.training = training
                    result = twin(*inputs)
                else:
                    result = calling(node, list(node.all_input_nodes))(inputs)
        except Exception:  # whatever code of a user's does with such numbers
            return None
        if not isinstance(result, Tensor):
            return None
        rows = result.transpose(0, self._found.flow.channels[node].dim).flatten(1).double()
        same = rows.amax(1) - rows.amin(1) <= 1e-12 * rows.abs().amax(1).clamp(min=1.0)
        return torch.where(same, rows[:, 0], float("nan"))

    def _dropout(self, node: fx.Node, n: int, x: Value) -> Value | None:
        p: Any = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        if node.op == "call_module":
            p = getattr(self._graph.module(node), "p", 0.5)
        if not isinstance(p, (int, float)) or p >= 1:
            return None
        return Value(x.center, ((x.radius + p * x.center.abs().amax(0)) / (1 - p)).clamp(max=_ANY), x.dead)

    def _pool(self, node: fx.Node, n: int, x: Value) -> Value | None:
        name = str(getattr(node.target, "__name__", node.target))
        if node.op == "call_module":
            name = type(self._graph.module(node)).__name__.lower()
        if not ("pad" in name or name.startswith("avg")):
            return x
        if name == "pad" and (node.kwargs.get("value") or node.args[3:]):
            return None
        return Value(x.center, (x.radius + x.center.abs().amax(0)).clamp(max=_ANY), x.dead)

    def _binary(self, node: fx.Node, n: int) -> Value | None:
        name = str(getattr(node.target, "__name__", node.target)).rstrip("_").removeprefix("i")
        left, right = (self._operand(node, i, n) for i in range(2))
        if left is None or right is None or node.kwargs:
            return None
        dead = left.dead & right.dead
        if name in ("add", "sub"):
            center = left.center + right.center if name == "add" else left.center - right.center
            return Value(center, (left.radius + right.radius).clamp(max=_ANY), dead)
        if name in ("mul", "multiply"):
            a, b = left.center.abs().amax(0), right.center.abs().amax(0)
            radius = a * right.radius + b * left.radius + left.radius * right.radius
            # A gate that is zero stops the channel; so does a scale.
            nothing = (left.size <= self._threshold) | (right.size <= self._threshold)
            return Value(left.center * right.center, radius.clamp(max=_ANY), dead | nothing)
        if name in ("truediv", "div", "divide"):
            exact = (left.radius == 0) & (right.radius == 0)
            return _where_exact(left.center / right.center, exact, dead)
        return _unknown(dead)

    def _operand(self, node: fx.Node, index: int, n: int) -> Value | None:
        """An operand, spread over all channels if it has only one."""
        if len(node.args) < 2:
            return None
        operand = node.args[index]
        if isinstance(operand, (int, float)):
            return _constant(torch.full((n,), float(operand)))
        if not isinstance(operand, fx.Node):
            return None
        if operand.op == "get_attr":
            return self._parameter(node, operand, n)
        value = self.of.get(operand, _alive(1))
        return value if value.dead.numel() == n else value.take(torch.zeros(n, dtype=torch.int64))

    def _parameter(self, node: fx.Node, operand: fx.Node, n: int) -> Value:
        """A parameter used directly: constants along the channels, if it has nothing but channels."""
        value = self._graph.attribute(operand).detach().double().cpu()
        rank, dim = len(self._graph.shapes[node]), self._found.flow.channels[node].dim
        own = dim - (rank - value.dim())
        if value.numel() == 1:
            return _constant(value.reshape(1).expand(n))
        if own >= 0 and value.numel() == value.shape[own] == n:
            return _constant(value.reshape(-1))
        largest = value.abs().max().expand(n)
        return Value(torch.zeros(2, n).double(), largest.clamp(max=_ANY), torch.ones(n, dtype=torch.bool))

    def _cat(self, node: fx.Node, n: int) -> Value | None:
        listed = node.args[0] if node.args else node.kwargs.get("tensors")
        sources = listed if isinstance(listed, (list, tuple)) else node.all_input_nodes
        parts = [self.of[source] for source in sources if isinstance(source, fx.Node) and source in self.of]
        if sum(part.dead.numel() for part in parts) != n:
            return None
        return Value(
            torch.cat([part.center for part in parts], 1),
            torch.cat([part.radius for part in parts]),
            torch.cat([part.dead for part in parts]),
        )

    def _select(self, node: fx.Node, n: int, x: Value) -> Value:
        module: Any = self._graph.module(node)
        return x.take(module.channels.cpu())

    def _scatter(self, node: fx.Node, n: int, x: Value) -> Value:
        module: Any = self._graph.module(node)
        index, result = module.channels.cpu(), _constant(torch.zeros(n))
        result.center[:, index], result.radius[index], result.dead[index] = x.center, x.radius, x.dead
        return result

    def _removed_conv(self, node: fx.Node, n: int) -> Value:
        bias = self._graph.module(node).bias
        return _constant(bias.detach().double().cpu() if isinstance(bias, Tensor) else torch.zeros(n))

    def _reduce(self, node: fx.Node, n: int, x: Value) -> Value | None:
        name = str(getattr(node.target, "__name__", node.target))
        return x if x.dead.numel() == n and name in ("mean", "amax", "amin") else None

    def _same(self, node: fx.Node, n: int, x: Value) -> Value:
        if x.dead.numel() == n:
            return x
        return x.take(torch.arange(x.dead.numel()).repeat_interleave(n // x.dead.numel()))


_KEEPS_VALUES = {"contiguous", "clone", "float", "double", "half", "to", "type", "detach", "requires_grad_"}


def _alive(n: int) -> Value:
    """Depends on the input."""
    return _unknown(torch.zeros(n, dtype=torch.bool))


def _unknown(dead: Tensor) -> Value:
    n = dead.numel()
    return Value(torch.zeros(2, n).double(), torch.full((n,), _ANY).double(), dead)


def _where_exact(center: Tensor, exact: Tensor, dead: Tensor) -> Value:
    """Known where the operands are and the result is finite, unknown elsewhere."""
    radius = torch.where(exact & center.isfinite().all(0), 0.0, _ANY).double()
    return Value(center.nan_to_num(0.0, 0.0, 0.0), radius, dead)


def _constant(value: Tensor) -> Value:
    n = value.numel()
    center = value.double().expand(2, n).clone()
    return Value(center, torch.zeros(n).double(), torch.ones(n, dtype=torch.bool))
