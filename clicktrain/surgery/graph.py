"""The model as a torch.fx graph with the shape of every value, taken without leaving a trace on the model."""

from __future__ import annotations

import contextlib
import operator
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from clicktrain.errors import UserError
from clicktrain.surgery.layers import SURGERY_LAYERS

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


@dataclass(frozen=True, slots=True, eq=False)
class ModelGraph:
    """A traced model.

    Attributes:
        model: what was traced.
        nodes: the fx nodes, in the order of execution.
        shapes: shape of every node's value that is a tensor.
        sizes: values that are numbers or tuples of them (what ``x.shape`` and arithmetic on it give).
        opaque: path -> reason, for modules that could not be traced into; they are single nodes.
    """

    model: nn.Module
    nodes: tuple[fx.Node, ...]
    shapes: dict[fx.Node, tuple[int, ...]]
    sizes: dict[fx.Node, Any]
    opaque: dict[str, str]

    def module(self, node: fx.Node) -> nn.Module:
        """What a ``call_module`` node calls."""
        return self.model.get_submodule(str(node.target))


def trace(model: nn.Module, example: Tensor | tuple[Any, ...]) -> ModelGraph:
    """Trace a model, and run the graph once on the example, in evaluation mode, for the shapes.

    Modes, buffers and random state are afterwards as before; hooks do not see the pass.

    Args:
        model: the module itself, not a wrapper around it.
        example: its positional arguments, or the only one; [N, C, H, W] for images.

    Raises:
        UserError: the model cannot be traced (its own ``forward`` depends on data), or is a wrapper.
    """
    if hasattr(model, "_orig_mod") or type(model).__module__.startswith("torch.nn.parallel"):
        inner = "model._orig_mod" if hasattr(model, "_orig_mod") else "model.module"
        raise UserError(f"surgery is done on the model inside {type(model).__name__}: pass {inner}")
    arguments = example if isinstance(example, tuple) else (example,)
    opaque: dict[str, str] = {}
    with _undisturbed(model):
        while True:
            tracer = _Tracer(opaque)
            try:
                graph = tracer.trace(model)
                break
            except Exception as error:
                reason = _first_line(error)
                if not tracer.failed or tracer.failed in opaque:
                    raise UserError(
                        f"channels of {type(model).__name__} cannot be removed, because torch.fx cannot "
                        f"trace its forward ({reason}): write it without branches on the values of tensors"
                    ) from error
                opaque[tracer.failed] = reason
        _later_uses_see_changes(graph, model)
        recorder = _Recorder(fx.GraphModule(model, graph))
        try:
            with torch.no_grad():
                recorder.run(*arguments)
        except Exception as error:
            raise UserError(f"the model does not run on the example: {_first_line(error)}") from error
    # The recorder walks a copy of the graph; its nodes are known by name.
    nodes = tuple(graph.nodes)
    shapes = {node: recorder.shapes[node.name] for node in nodes if node.name in recorder.shapes}
    sizes = {node: recorder.sizes[node.name] for node in nodes if node.name in recorder.sizes}
    return ModelGraph(model, nodes, shapes, sizes, opaque)


class _Proxy(fx.Proxy):
    """Augmented assignments are recorded as such: ``x += y`` writes into x, unlike ``x + y``."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Tracer(fx.Tracer):
    """Notes which module a failure came from; the layers that surgery puts in are leaves."""

    def __init__(self, opaque: dict[str, str]) -> None:
        super().__init__()
        self._opaque = opaque
        self.failed = ""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, SURGERY_LAYERS) or module_qualified_name in self._opaque
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps shapes and sizes instead of values."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.sizes: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n.name] = tuple(result.shape)
        elif isinstance(result, (int, torch.Size)):
            self.sizes[n.name] = result
        return result


def _later_uses_see_changes(graph: fx.Graph, model: nn.Module) -> None:
    """After an operation in place, later users of the old value are users of the new one."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        target = str(node.target)
        method = node.op == "call_method" and target.endswith("_") and not target.endswith("__")
        function = node.kwargs.get("inplace") is True
        layer = node.op == "call_module" and getattr(model.get_submodule(target), "inplace", False) is True
        if (method or function or layer or changes_in_place(node)) and node.args:
            first = node.args[0]
            if isinstance(first, fx.Node):

                def later(user: fx.Node, place: int = order[node]) -> bool:
                    return order[user] > place

                first.replace_all_uses_with(node, later)


def changes_in_place(node: fx.Node) -> bool:
    """Whether a node is an augmented assignment such as ``x += y`` or its method ``x.add_(y)``."""
    if node.op == "call_function":
        module, name = getattr(node.target, "__module__", None), getattr(node.target, "__name__", "")
        return module == "_operator" and name in ("iadd", "isub", "imul", "itruediv")
    return node.op == "call_method" and str(node.target) in ("add_", "sub_", "mul_", "div_")


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no hooks inside; afterwards everything is as before."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    hooks = [{name: getattr(module, name) for name in _HOOKS} for module in modules]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]):
        try:
            for module in modules:
                module.training = False
                for name in _HOOKS:
                    setattr(module, name, OrderedDict())
            yield
        finally:
            for module, mode, kept in zip(modules, modes, hooks, strict=True):
                module.training = mode
                for name, table in kept.items():
                    setattr(module, name, table)
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):
                        buffer.copy_(before)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
