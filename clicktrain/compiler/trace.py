"""From a module to a graph with shapes: ``torch.fx`` with packed convolutions as leaves.

Every target in the graph starts with `ROOT`, so that a graph module made from it finds layers and parameters
where the model has them at the time of a call, not where they were when it was traced.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from clicktrain.kernels.sparse_conv2d import PackedConv2d

ROOT = "base"
"""Name under which the model hangs in graph modules."""

_OUT_OF_PLACE_METHODS = {"relu_": "relu", "add_": "add"}


class TraceError(Exception):
    """Why a model has no graph, in one clause."""


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """A model as a graph.

    Attributes:
        graph: its nodes have ``meta["tensor_meta"]`` of the example; in-place operations have been replaced.
        model: what was traced.
        inputs: number of positional arguments that the graph takes.
        opaque: paths of modules that could not be traced into and run as they are, with the reason.
        entered: paths of the modules that were traced through.
        by_mode: whether the graph depends on the ``training`` flags of these: they are constants in it.
    """

    graph: fx.Graph
    model: nn.Module
    inputs: int
    opaque: dict[str, str]
    entered: tuple[str, ...]
    by_mode: bool = False

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a ``call_module`` node calls."""
        return self.model.get_submodule(layer_name(node))

    def graph_module(self) -> fx.GraphModule:
        """The graph as a function of the model."""
        return fx.GraphModule(_rooted(self.model), self.graph)


def layer_name(node: fx.Node) -> str:
    """Path in the model of what a node calls or gets."""
    return str(node.target)[len(ROOT) + 1 :]


def trace(model: nn.Module, example: tuple[Any, ...]) -> Traced:
    """Trace a model in the modes that it is in, and find the shapes of all values on an example.

    What cannot be traced into, runs as one opaque module. Parameters, buffers, modes and the state of random
    generators are afterwards as before. Under autocast, shapes and number types are those without it.

    Raises:
        TraceError: the model's own ``forward`` cannot be traced, or its graph computes something else.
    """
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return trace(model, tuple(map(_whole, example)))
    here = _symbolic(model, example)
    with undisturbed(model):
        evaluated = _symbolic(model, example)
        _propagate(evaluated, example, compare=True)
        for module in model.modules():
            module.training = True
        by_mode = _text(evaluated) != _text(_symbolic(model, example))
    if not by_mode:
        return evaluated
    with undisturbed(model):
        _propagate(here, example, compare=False)
    return replace(here, by_mode=True)


def _symbolic(model: nn.Module, example: tuple[Any, ...]) -> Traced:
    opaque: dict[str, str] = {}
    while True:
        tracer = _Tracer(opaque)
        try:
            graph = tracer.trace(model, _left_out(model, example))
            break
        except Exception as error:
            reason = f"{type(error).__name__}: {_first_line(error)}"
            if not tracer.failed or tracer.failed in opaque:
                raise TraceError(reason) from error
            opaque[tracer.failed] = reason
    _out_of_place(graph, model)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = f"{ROOT}.{node.target}"
    return Traced(graph, model, len(example), opaque, tuple(tracer.entered))


class _Tracer(fx.Tracer):
    """Remembers which module a failure came from, and what was traced through."""

    def __init__(self, opaque: dict[str, str]) -> None:
        super().__init__()
        self._opaque = opaque
        self.failed = ""
        self.entered: list[str] = [""]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, PackedConv2d) or module_qualified_name in self._opaque:
            return True
        # A module of the user's own that only calls functions is part of the graph; one with parameters and
        # without children is an operator of its own.
        own = next(m.parameters(recurse=False), None) is not None and not any(m.children())
        return own or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        leaf = self.is_leaf_module(m, path)
        try:
            result = super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or path
            raise
        if not leaf:
            self.entered.append(path)
        return result


def _left_out(model: nn.Module, example: tuple[Any, ...]) -> dict[str, Any]:
    """Arguments of ``forward`` that the example leaves at their defaults: constants of the graph."""
    parameters = list(inspect.signature(model.forward).parameters.values())[len(example) :]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p.default for p in parameters if p.kind in kinds and p.default is not p.empty}


def _out_of_place(graph: fx.Graph, model: nn.Module) -> None:
    """Give later users of a value that is changed in place the changed one; functions need not change it.

    Layers that work in place go on doing so: only their results are used afterwards.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target = str(node.target)
        method = node.op == "call_method" and target.endswith("_") and not target.endswith("__")
        function = node.kwargs.get("inplace") is True
        layer = node.op == "call_module" and getattr(model.get_submodule(target), "inplace", False) is True
        if not (method or function or layer) or not node.all_input_nodes:
            continue

        def later(user: fx.Node, place: int = order[node]) -> bool:
            return order[user] > place

        node.all_input_nodes[0].replace_all_uses_with(node, later)
        if function:
            node.kwargs = {**node.kwargs, "inplace": False}
        elif method:
            node.target = _OUT_OF_PLACE_METHODS.get(target, target)


@torch.no_grad()
def _propagate(traced: Traced, example: tuple[Any, ...], *, compare: bool) -> None:
    """Run the graph, which notes the shapes; if asked to, make sure that it computes what the model does."""
    try:
        found = ShapeProp(traced.graph_module()).propagate(*example)
    except Exception as error:
        raise TraceError(f"its graph does not run: {_first_line(error)}") from error
    if compare and not _agree(found, traced.model(*example)):
        raise TraceError("its graph computes something else than the model")


def _whole(x: Any) -> Any:
    """What autocast would have taken in a smaller number type, as float32."""
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


def _text(traced: Traced) -> str:
    return "\n".join(f"{n.op} {n.name} {n.target} {n.args} {n.kwargs}" for n in traced.graph.nodes)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards modes, buffers and random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


def _agree(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return (
            isinstance(found, Tensor)
            and found.shape == expected.shape
            and torch.allclose(found, expected, rtol=1e-3, atol=1e-5, equal_nan=True)
        )
    if isinstance(expected, dict):
        return expected.keys() == found.keys() and all(_agree(found[k], expected[k]) for k in expected)
    if isinstance(expected, (tuple, list)):
        return len(expected) == len(found) and all(map(_agree, found, expected))
    return bool(found == expected)


def _rooted(model: nn.Module) -> nn.Module:
    root = nn.Module()
    root._modules[ROOT] = model
    return root


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
