"""Rewriting a graph by a plan: regions in the batch-blocked layout, conversions where they begin and end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn
from torch.nn.modules.module import _has_any_global_hook

from clicktrain.compiler import steps
from clicktrain.compiler.guards import Guards
from clicktrain.compiler.norm_statistics import convolutions_before_norms
from clicktrain.compiler.passes import Pass, pass_of, pass_text
from clicktrain.compiler.plan import DENSE, Choice, LoweringPlan, kept_in
from clicktrain.compiler.units import Unit, find_units, max_pooling, modules_in, shape_of, watched
from clicktrain.graph import ModelGraph
from clicktrain.graph.copying import HOOK_TABLES
from clicktrain.kernels.native import KernelError, toolchain
from clicktrain.kernels.native.library import build_all
from clicktrain.kernels.sparse_conv2d import PackedConv2d
from clicktrain.kernels.sparse_conv2d.blocked.launch import compile_plan

ROOT = "base"
"""Name under which the model hangs in lowered graphs: they find layers and parameters where the model has
them at the time of a call, not where they were when it was traced."""
_STEPS = "steps"
_CONSTANTS = "constants"


@dataclass(frozen=True, slots=True, eq=False)
class Lowered:
    """A graph that runs, and whom it stands for.

    Attributes:
        run: as the model's ``forward``.
        watched: modules that are not called any more: layers that run as a step, and those traced through.
        guards: what has to be as it was.
        tables: of the hooks of ``watched``.
        parameter: (layer, name, dtype) of the one parameter that tells whether the model moved.
        plan: by which it was lowered: where kernels cannot be built, layers are plain that were not to be.
    """

    run: fx.GraphModule
    watched: tuple[nn.Module, ...]
    guards: Guards
    tables: tuple[Mapping[int, object], ...]
    parameter: tuple[nn.Module, str, torch.dtype] | None = None
    plan: LoweringPlan | None = None

    def current(self) -> bool:
        """Whether all is as it was when the model was lowered: layers, what they read, dtype and device."""
        if self.parameter is not None:
            module, name, dtype = self.parameter
            parameter = module._parameters.get(name)
            if parameter is None or parameter.dtype is not dtype or not parameter.is_cpu:
                return False
        return self.guards.hold()

    def hooked(self) -> bool:
        """Whether somebody has begun to watch layers that are not called any more."""
        anywhere: bool = _has_any_global_hook()  # type: ignore[no-untyped-call]
        if not (anywhere or any(self.tables)):
            return False
        return anywhere or any(map(watched, self.watched))


def lower(traced: ModelGraph, plan: LoweringPlan, dtype: torch.dtype) -> Lowered:
    """Rewrite a traced model so that units run where the plan says; what the plan does not name runs plain.

    All kernels are built and loaded here. Units whose kernels cannot be built run plain; who watches failures
    is told.

    Args:
        traced: with shapes.
        plan: choices by unit name; tilings are taken for images of the size that they were measured on.
        dtype: number type of the parameters; the plan says what accelerated regions keep activations in.
    """
    units, _ = find_units(traced)
    choices = plan.by_layer()
    writer = _Writer(traced, choices, dtype, kept_in(plan.activations, dtype))
    stepped = []
    for unit in units:
        choice = choices.get(unit.name)
        if choice is not None and choice.kind == unit.kind and not _unpacked(unit, choice):
            if choice.layout == "blocked":
                writer.blocked_units.update(dict.fromkeys(unit.nodes, unit))
                stepped.append(unit)
            elif unit.kind == "conv" and choice.dense != DENSE[0]:
                writer.dense[unit.output] = choice
                stepped.append(unit)
    for name, norm in convolutions_before_norms(stepped).items():
        if choices[name].statistics:
            writer.joined[norm.inputs[0]] = norm
    layers = [module for _, module in modules_in(stepped, traced)]
    parameter = None
    for layer in layers:
        if isinstance(layer, (PackedConv2d, nn.Conv2d)):
            parameter = (layer, "values" if isinstance(layer, PackedConv2d) else "weight", dtype)
            break
    inside = [traced.model.get_submodule(path) for path in traced.entered if path]
    unseen = tuple(dict.fromkeys((*layers, *inside)))
    tables = tuple(getattr(module, name) for module in unseen for name in HOOK_TABLES)
    lowered = Lowered(writer.write(), unseen, Guards(traced, layers), tables, parameter, plan)
    # Side by side now rather than one by one when they are first called.
    failed = build_all([text for texts in (*writer.needs.values(), *writer.sums.values()) for text in texts])
    return lower(traced, _without(plan, units, writer, failed), dtype) if failed else lowered


def _without(
    plan: LoweringPlan, units: Sequence[Unit], writer: _Writer, failed: Mapping[str, KernelError]
) -> LoweringPlan:
    """The plan without what needs kernels that cannot be built; at least one of its choices changes."""
    unusable = {
        name: str(next(failed[text] for text in texts if text in failed))
        for name, texts in writer.needs.items()
        if any(text in failed for text in texts)
    }
    blocked = [unit for unit in units if unit in writer.blocked_units.values() and unit.name not in unusable]
    if unusable and not any(unit.kind == "conv" for unit in blocked):
        # Conversions to and fro would pay for nothing.
        cause = next(iter(unusable.values()))
        unusable |= {unit.name: cause for unit in blocked}
    apart = {name for name, texts in writer.sums.items() if any(text in failed for text in texts)}
    apart |= {name for name, norm in convolutions_before_norms(units).items() if norm.name in unusable}
    return plan.without(unusable, apart)


def _unpacked(unit: Unit, choice: Choice) -> bool:
    """Whether a layer has become dense since it was chosen to run sparse: that choice is void."""
    return isinstance(unit.module, nn.Conv2d) and choice.density < 1


class _Writer:
    """Copies a graph node by node; each value is there in one layout, or in both once both are wanted."""

    def __init__(
        self, traced: ModelGraph, choices: dict[str, Choice], dtype: torch.dtype, kept: torch.dtype
    ) -> None:
        tools = toolchain()
        self.lanes = tools.lanes(kept) if tools else 0
        self.indifferent = {node for unit in find_units(traced)[0] for node in unit.nodes}
        """Operations that take any memory format; the model's own code gets the one that it is used to."""
        self.traced, self.choices, self.dtype, self.kept = traced, choices, dtype, kept
        self.blocked_units: dict[fx.Node, Unit] = {}
        self.dense: dict[fx.Node, Choice] = {}
        self.joined: dict[fx.Node, Unit] = {}
        """By a convolution's node the batch norm that it takes the statistics of: both run there."""
        self.graph = fx.Graph()
        self.steps = nn.Module()
        self._plain: dict[fx.Node, fx.Node] = {}
        self._blocked: dict[fx.Node, fx.Node] = {}
        self._strange: set[fx.Node] = set()
        """Nodes whose plain values may be in another memory format than in the model."""
        self._usual: dict[fx.Node, fx.Node] = {}
        self._images: dict[fx.Node, fx.Node] = {}
        """Number of images of a blocked value."""
        self.needs: dict[str, list[str]] = {}
        """C texts by the name of the unit that needs them."""
        self.sums: dict[str, list[str]] = {}
        """C texts by the name of the convolution that takes statistics by them."""

    def write(self) -> fx.GraphModule:
        """The lowered graph as a module."""
        for node in self.traced.graph.nodes:
            unit = self.blocked_units.get(node)
            if unit is not None:
                if node is unit.output:
                    self._write_blocked(unit)
            elif node in self.dense:
                self._plain[node] = self._write_dense(node, self.dense[node])
                self._strange.add(node)
            elif node in self.indifferent:
                self._plain[node] = self._copy(node, self.plain)
                if any(source in self._strange or source in self._blocked for source in node.all_input_nodes):
                    self._strange.add(node)
            else:
                self._plain[node] = self._copy(node, self.as_the_model_has_it)
        constants = nn.Module()
        constants.__dict__.update(self.traced.constants)
        held = {ROOT: self.traced.model, _STEPS: self.steps, _CONSTANTS: constants}
        root = nn.Module()
        root._modules.update(held)
        module = fx.GraphModule(root, self.graph, "Lowered")
        # As they are: the graph module would have made holders of its own for what it calls.
        module._modules.update(held)
        return module

    def _copy(self, node: fx.Node, argument: Callable[[fx.Node], fx.Node]) -> fx.Node:
        twin = self.graph.node_copy(node, argument)
        if node.op in ("call_module", "get_attr"):
            home = _CONSTANTS if str(node.target) in self.traced.constants else ROOT
            twin.target = f"{home}.{node.target}"
        return twin

    def as_the_model_has_it(self, node: fx.Node) -> fx.Node:
        """The value as [N, C, H, W] in the memory format that it has in the model."""
        known = getattr(node.meta.get("tensor_meta"), "memory_format", None) or torch.contiguous_format
        usual = node not in self._blocked or known is torch.contiguous_format
        if len(shape_of(node)) != 4 or (usual and node not in self._strange):
            return self.plain(node)
        if node not in self._usual:
            self._usual[node] = self.graph.call_function(steps.in_format, (self.plain(node), known))
        return self._usual[node]

    def plain(self, node: fx.Node) -> fx.Node:
        """The value as [N, C, H, W], converted if need be."""
        if node not in self._plain:
            arguments = (self._blocked[node], self._images[node], self.dtype)
            self._plain[node] = self.graph.call_function(steps.unblock, arguments)
        return self._plain[node]

    def blocked(self, node: fx.Node) -> fx.Node:
        """The value as [B, C, H, W, V], converted if need be."""
        if node not in self._blocked:
            x = self._plain[node]
            self._images[node] = self.graph.call_method("size", (x, 0))
            self._blocked[node] = self._call(f"block_{x.name}", steps.Block(self.lanes, self.kept), x)
        return self._blocked[node]

    def _write_blocked(self, unit: Unit) -> None:
        if unit.output in self.joined:
            return
        if unit.kind == "batch_norm" and unit.inputs[0] in self.joined:
            self._write_joined(unit)
            return
        self._need(unit)
        x, *others = [self.blocked(node) for node in unit.inputs]
        n = self._images[unit.inputs[0]]
        node, layer = unit.output, unit.module
        if unit.kind == "global_pool":
            keepdim = len(shape_of(node)) == 4
            self._plain[node] = self.graph.call_function(steps.image_mean, (x, n, keepdim, self.dtype))
            return
        if unit.kind == "conv":
            y = self._call(unit.name, self._conv(unit), x)
        elif unit.kind == "batch_norm":
            assert isinstance(layer, nn.BatchNorm2d)
            y = self._call(unit.name, steps.BatchNorm(layer, unit.relu), x, n, *others)
        elif (pooling := max_pooling(unit)) is not None:
            y = self._call(unit.name, steps.MaxPool(pooling), x)
        elif unit.kind == "pool":
            view = self.graph.call_function(steps.as_images, (x,))
            pooled = self._copy(node, lambda _: view)
            y = self.graph.call_function(steps.as_blocks, (pooled, x))
        elif layer is not None:
            y = self._call(unit.name, steps.Activation(layer), x)
        else:
            y = self._copy(node, self.blocked)
        self._blocked[node] = y
        self._images[node] = n

    def _write_joined(self, norm: Unit) -> None:
        """A convolution and its batch norm, where the norm stands: what it adds may come in between."""
        conv, layer = self.blocked_units[norm.inputs[0]], norm.module
        assert isinstance(layer, nn.BatchNorm2d)
        x, *others = [self.blocked(node) for node in (*conv.inputs, *norm.inputs[1:])]
        n = self._images[conv.inputs[0]]
        step = steps.ConvBatchNorm(self._conv(conv), steps.BatchNorm(layer, norm.relu))
        self.sums[conv.name] = compile_plan(step.conv.text, self.kept, ["forward"], sums=True)
        self._need(norm)
        self._blocked[norm.output] = self._call(norm.name, step, x, n, *others)
        self._images[norm.output] = n

    def _conv(self, unit: Unit) -> steps.BlockedConv:
        shape = shape_of(unit.inputs[0])
        choice = self.choices[unit.name]
        same = choice.image == shape[1:]
        tilings = dict(choice.tilings) if same else {}
        if self.kept is not torch.bfloat16:  # the model has a dtype other than when it was measured
            tilings = {phase: replace(tiling, pairs=False) for phase, tiling in tilings.items()}
        layer = unit.module
        assert isinstance(layer, (PackedConv2d, nn.Conv2d))
        step = steps.BlockedConv(layer, (shape[2], shape[3]), tilings)
        self._need(unit, *compile_plan(step.text, self.kept))
        return step

    def _need(self, unit: Unit, *texts: str) -> None:
        """Note the kernels that a blocked unit runs on."""
        named = pass_of(unit)
        passes: list[Pass] = ["layout"] if named is None else ["layout", named]
        self.needs[unit.name] = [*texts, *(pass_text(name, self.kept) for name in passes)]

    def _write_dense(self, node: fx.Node, choice: Choice) -> fx.Node:
        layer = self.traced.module(node)
        assert isinstance(layer, (PackedConv2d, nn.Conv2d))
        step = steps.DenseConv(layer, choice.dense.startswith("channels_last"), choice.dense.endswith("bf16"))
        return self._call(str(node.target), step, self.plain(node.all_input_nodes[0]))

    def _call(self, name: str, step: nn.Module, *arguments: fx.Node) -> fx.Node:
        key = name.replace(".", "_").replace("#", "_call")
        while key in self.steps._modules:
            key += "_"
        self.steps._modules[key] = step
        return self.graph.call_module(f"{_STEPS}.{key}", arguments)
