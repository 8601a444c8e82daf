"""The model as a graph in evaluation and in training mode: what surgery looks at.

Layers that are called in one mode only (auxiliary heads, features for a second loss) are seen there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from clicktrain.errors import UserError
from clicktrain.graph import Inputs, ModelGraph, TraceError, own_random_numbers, working_copy
from clicktrain.graph.inputs import owned
from clicktrain.graph.trace import one_line
from clicktrain.graph.trace import trace as trace_call
from clicktrain.surgery.layers import SURGERY_LAYERS
from clicktrain.surgery.operations import function_kind, layer_kind
from clicktrain.surgery.probing import kind_by_trial, layer_keeps_channels, may_keep_channels
from clicktrain.surgery.steady import NormAlone, norm_alone_

_NO_CALLS = {"placeholder": "input", "output": "output", "get_attr": "attribute"}
MODES = {False: "in evaluation mode", True: "while training"}


@dataclass(frozen=True, slots=True, eq=False)
class NetworkGraph:
    """A model's forward passes.

    Attributes:
        training: the pass in training mode; None where it is the same.
        shapes, sizes: of the values in both, see `clicktrain.graph.ModelGraph`.
        opaque: path -> reason, for modules that are single nodes in one of them.
        kinds: path -> word, for layers whose ``forward`` is their own but computes what their parent's does.
    """

    model: nn.Module
    evaluation: ModelGraph
    training: ModelGraph | None
    shapes: dict[fx.Node, tuple[int, ...]]
    sizes: dict[fx.Node, Any]
    opaque: dict[str, str]
    kinds: dict[str, str]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Nodes of the pass in evaluation mode, in the order of execution."""
        return self.evaluation.nodes

    @property
    def training_nodes(self) -> tuple[fx.Node, ...]:
        """Nodes of the pass in training mode; the same ones where the passes agree."""
        return self.nodes if self.training is None else self.training.nodes

    @property
    def all_nodes(self) -> tuple[fx.Node, ...]:
        """Nodes of both passes, each once."""
        return self.nodes if self.training is None else (*self.nodes, *self.training.nodes)

    @property
    def passes(self) -> tuple[ModelGraph, ...]:
        """One, or two that differ."""
        return (self.evaluation,) if self.training is None else (self.evaluation, self.training)

    def module(self, node: fx.Node) -> nn.Module:
        """What a ``call_module`` node calls."""
        return self.model.get_submodule(str(node.target))

    def operation(self, node: fx.Node) -> str:
        """One word for what a node does to channels; see `operations`."""
        if node.op != "call_module":
            return _NO_CALLS.get(node.op) or function_kind(node)
        path = str(node.target)
        known = None if path in self.opaque else layer_kind(self.module(node))
        return self.kinds.get(path) or known or "unknown"

    def words(self, node: fx.Node) -> str:
        """A node in the words of the user, for reasons."""
        if node.op == "call_module":
            return f"{node.target} ({type(self.module(node)).__name__})"
        return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target))

    def attribute(self, node: fx.Node) -> Any:
        """What a ``get_attr`` node gets."""
        owner = next(graph for graph in self.passes if node.graph is graph.graph)
        return owner.attribute(node)


def trace(model: nn.Module, inputs: Inputs) -> NetworkGraph:
    """Trace a model in both modes; nothing of it changes.

    Args:
        inputs: of a call; several images, for the sake of batch norms.

    Raises:
        UserError: the model cannot be traced (its own ``forward`` depends on data), or is a wrapper.
    """
    if hasattr(model, "_orig_mod") or type(model).__module__.startswith("torch.nn.parallel"):
        inner = "model._orig_mod" if hasattr(model, "_orig_mod") else "model.module"
        raise UserError(f"surgery is done on the model inside {type(model).__name__}: pass {inner}")
    kinds = {
        name: kind
        for name, module in model.named_modules()
        if name and layer_kind(module) is None and (kind := kind_by_trial(module)) is not None
    }
    whole = dict.fromkeys(kinds, "a layer with a forward of its own") | {
        name: "a layer of its own kind"
        for name, module in model.named_modules()
        if name and name not in kinds and layer_kind(module) is None and may_keep_channels(module)
    }
    evaluation = _traced(model, inputs, False, whole)
    mixing = _mixing(evaluation, whole.keys() - kinds.keys())
    if mixing:
        whole = {name: reason for name, reason in whole.items() if name not in mixing}
        evaluation = _traced(model, inputs, False, whole)
    training: ModelGraph | None = _traced(model, inputs, True, whole)
    assert training is not None
    if _text(training) == _text(evaluation):
        training = None
    passes = (evaluation,) if training is None else (evaluation, training)
    shapes: dict[fx.Node, tuple[int, ...]] = {}
    sizes: dict[fx.Node, Any] = {}
    opaque: dict[str, str] = {}
    for graph in passes:
        shapes |= graph.shapes
        sizes |= {node: value for node, value in graph.sizes.items() if _is_size(value)}
        opaque |= graph.opaque
    return NetworkGraph(model, evaluation, training, shapes, sizes, opaque, kinds)


def _traced(model: nn.Module, inputs: Inputs, training: bool, whole: Mapping[str, str]) -> ModelGraph:
    traced = model
    if any(type(module) is nn.SyncBatchNorm for module in model.modules()):
        # Another process may not be asking at this moment.
        traced = working_copy(model)
        norm_alone_(traced)
    try:
        graph = trace_call(traced, inputs, training=training, leaves=_is_leaf, opaque=whole)
        return replace(graph, model=model)
    except TraceError as error:
        _check_runs(model, inputs, training)
        raise UserError(
            f"channels of {type(model).__name__} cannot be removed, because torch.fx cannot trace its "
            f"forward {MODES[training]} ({error}): write it without branches on the values of tensors"
        ) from error


def _check_runs(model: nn.Module, inputs: Inputs, training: bool) -> None:
    """A UserError if it is the example that does not fit the model."""
    twin = working_copy(model)
    twin.train(training)
    norm_alone_(twin)
    try:
        with own_random_numbers(inputs.tensors()), torch.no_grad():
            owned(inputs).call(twin)
    except Exception as error:
        raise UserError(
            f"the model does not run on the example {MODES[training]}: {one_line(error)}"
        ) from error


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, (*SURGERY_LAYERS, NormAlone)) or layer_kind(module) is not None


def _mixing(graph: ModelGraph, whole: Collection[str]) -> set[str]:
    """Modules that were taken for layers that work inside each channel, and do not: these are traced into."""
    mixing = set()
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "call_module" and name in whole:
            source = node.all_input_nodes[0] if node.all_input_nodes else None
            meta = None if source is None else source.meta.get("tensor_meta")
            if meta is None or not layer_keeps_channels(graph.module(node), tuple(meta.shape), meta.dtype):
                mixing.add(name)
    return mixing


def _is_size(value: Any) -> bool:
    """Whether it is a number or a shape, not several tensors."""
    return isinstance(value, int) or (isinstance(value, tuple) and all(isinstance(v, int) for v in value))


def _text(graph: ModelGraph) -> str:
    lines = (f"{n.op} {n.name} {n.target} {n.args} {n.kwargs} {graph.shapes.get(n)}" for n in graph.nodes)
    return "\n".join((*lines, str(sorted(graph.opaque))))
