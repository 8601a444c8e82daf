"""From one call of a model to a graph with the shape of every value, without a trace on the model."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from clicktrain.graph.copying import working_copy
from clicktrain.graph.in_place import later_uses_see_changes
from clicktrain.graph.inputs import Inputs, as_inputs
from clicktrain.graph.random_state import own_random_numbers
from clicktrain.graph.tracer import IsLeaf, Tracer
from clicktrain.graph.watch import Read


class TraceError(Exception):
    """Why a model has no graph, in one clause."""


@dataclass(frozen=True, slots=True, eq=False)
class ModelGraph:
    """One call of a model as a graph.

    Attributes:
        model: what was traced; targets of the graph are paths in it.
        graph: one placeholder for each tensor of the inputs, in their order. After an operation in place,
            later nodes read its result. Nodes whose value is a tensor have ``meta["tensor_meta"]``.
        inputs: the call that was traced; what in it is not a tensor is a constant of the graph.
        sizes: values that are numbers or tuples of them (what ``x.shape`` and arithmetic on it give).
        opaque: path -> reason, for modules that could not be traced into; they are single nodes. Those that
            the caller named are here with the caller's reason.
        entered: paths of the modules that were traced through, "" for the model itself.
        effects: path -> what the module's ``forward`` does that the graph does not hold.
        reads: values that ``forward`` read: they are constants in the graph.
        names: all names in the user's code that ran: nothing else was looked up inside those values.
        constants: tensors that were made in ``forward``, by the name that the graph gets them under.
    """

    model: nn.Module
    graph: fx.Graph
    inputs: Inputs
    shapes: dict[fx.Node, tuple[int, ...]]
    sizes: dict[fx.Node, Any]
    opaque: dict[str, str]
    entered: tuple[str, ...]
    effects: dict[str, str]
    reads: tuple[Read, ...]
    names: frozenset[str]
    constants: dict[str, Tensor]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """In the order of execution."""
        return tuple(self.graph.nodes)

    def module(self, node: fx.Node) -> nn.Module:
        """What a ``call_module`` node calls."""
        return self.model.get_submodule(str(node.target))

    def attribute(self, node: fx.Node) -> Any:
        """What a ``get_attr`` node gets."""
        return get_attribute(self.model, self.constants, str(node.target))


def trace(
    model: nn.Module,
    example: Any,
    *,
    training: bool | None = False,
    leaves: IsLeaf = lambda module: False,
    opaque: Mapping[str, str] | None = None,
) -> ModelGraph:
    """Trace one call of a model, and run the graph once on the example for the shapes.

    Works on a copy: modes, buffers, attributes, gradients and random state of the model stay as they are, and
    hooks of the user do not see the pass (a module that has any is traced through all the same, unless it is
    named in ``opaque``). Modules whose ``forward`` cannot be traced become single nodes. Threads may trace at
    once; they take turns.

    Args:
        model: the module itself, not a wrapper around it.
        training: the mode to trace in, set as ``model.train(training)`` does; None leaves every module in its
            own.
        leaves: modules that are to be single nodes, besides those of PyTorch's own.

    Raises:
        TraceError: the model's own ``forward`` cannot be traced, or the graph does not run on the example.
    """
    inputs = as_inputs(example, model)
    twin = working_copy(model)
    if training is not None:
        twin.train(training)
    return trace_copy(model, twin, inputs, leaves, dict(opaque or {}))


def trace_copy(
    model: nn.Module, twin: nn.Module, inputs: Inputs, leaves: IsLeaf, opaque: dict[str, str]
) -> ModelGraph:
    """Trace a working copy in the modes that it is in; the copy's buffers may change.

    Raises:
        TraceError: as `trace`.
    """
    opaque = dict(opaque)
    tracer, graph, constants = _retrying(twin, inputs, leaves, opaque)
    later_uses_see_changes(graph, twin)
    shapes, sizes = record(graph, constants, twin, inputs)
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    opaque = {path: reason for path, reason in opaque.items() if path in called}
    watch, entered = tracer.watch, tuple(tracer.entered)
    names = frozenset(watch.names)
    return ModelGraph(
        model, graph, inputs, shapes, sizes, opaque, entered, watch.effects, watch.reads, names, constants
    )


def trace_symbolically(model: nn.Module, leaves: IsLeaf = lambda module: False) -> fx.Graph:
    """The graph of a call of which only the number of arguments is known: nothing runs, nothing has a shape.

    Arguments with defaults keep them. Everything else is as in `trace`.

    Raises:
        TraceError: the model's own ``forward`` cannot be traced.
    """
    twin = working_copy(model, tensors=False)
    _, graph, _ = _retrying(twin, None, leaves, {})
    return graph


def _retrying(
    twin: nn.Module, inputs: Inputs | None, leaves: IsLeaf, opaque: dict[str, str]
) -> tuple[Tracer, fx.Graph, dict[str, Tensor]]:
    """Trace, and once more for each module that cannot be traced into: it joins the opaque ones."""
    with own_random_numbers(() if inputs is None else inputs.tensors()), outside_autocast():
        while True:
            tracer = Tracer(inputs, leaves, opaque)
            traced = working_copy(twin, tensors=False)
            before = set(vars(traced))
            try:
                graph = tracer.trace_call(traced)
                break
            except Exception as error:  # whatever a user's forward does with a stand-in for a tensor
                reason = one_line(error)
                if not tracer.failed or tracer.failed in opaque:
                    raise TraceError(reason) from error
                opaque[tracer.failed] = reason
    tracer.release()
    return tracer, graph, {n: v for n, v in vars(traced).items() if n not in before and isinstance(v, Tensor)}


def record(
    graph: fx.Graph, constants: dict[str, Tensor], twin: nn.Module, inputs: Inputs
) -> tuple[dict[fx.Node, tuple[int, ...]], dict[fx.Node, Any]]:
    """Run a graph once: shapes and sizes of its values, as in `ModelGraph`, and ``meta["tensor_meta"]``.

    Raises:
        TraceError: the graph does not run.
    """
    recorder = Recorder(twin, graph, constants)
    with own_random_numbers(inputs.tensors()), outside_autocast(), torch.no_grad():
        try:
            recorder.run(*inputs.tensors())
        except Exception as error:
            raise TraceError(f"its graph does not run: {one_line(error)}") from error
    return recorder.shapes, recorder.sizes


class Recorder(fx.Interpreter):
    """Runs a graph on a model, and notes shapes and sizes of all values if asked to."""

    def __init__(
        self, model: nn.Module, graph: fx.Graph, constants: dict[str, Tensor], *, note: bool = True
    ) -> None:
        super().__init__(model, graph=graph)
        self._model, self._constants, self._note = model, constants, note
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.sizes: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One node."""
        result = super().run_node(n)
        if not self._note:
            return result
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
            n.meta["tensor_meta"] = _extract_tensor_metadata(result)
        elif isinstance(result, (int, tuple)):
            self.sizes[n] = result
        return result

    def fetch_attr(self, target: str) -> Any:
        """A parameter, a buffer, another attribute of the model, or a constant of the graph."""
        return get_attribute(self._model, self._constants, target)


def get_attribute(model: nn.Module, constants: Mapping[str, Tensor], target: str) -> Any:
    """What the path of a ``get_attr`` node means."""
    if target in constants:
        return constants[target]
    value: Any = model
    for name in target.split("."):
        value = getattr(value, name)
    return value


def one_line(error: BaseException) -> str:
    """An error as one clause: its class and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextlib.contextmanager
def outside_autocast() -> Iterator[None]:
    """Shapes and dtypes are those without autocast."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def force_eager() -> contextlib.AbstractContextManager[Any]:
    """Parts that compile themselves run in plain Python, where hooks and modes see them."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
