"""Rewrite a graph by a plan: regions in other layouts, conversions where they begin and end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.modules import module as torch_module

from clicktrain.compiler import steps
from clicktrain.compiler.guards import Guards
from clicktrain.compiler.layout_choice import PLAIN
from clicktrain.compiler.norm_statistics import convolutions_before_norms
from clicktrain.compiler.plan import DENSE, Choice, LoweringPlan, held_dtype
from clicktrain.compiler.units import (
    Unit,
    conv_of,
    find_units,
    max_pooling,
    modules_in,
    pass_of,
    runs_in,
    shape_of,
    watched,
)
from clicktrain.graph import ModelGraph
from clicktrain.graph.copying import HOOK_TABLES
from clicktrain.kernels.activations import NONE
from clicktrain.kernels.impls import ConvProblem
from clicktrain.kernels.layouts import LAYOUTS, Layout
from clicktrain.kernels.native import KernelError
from clicktrain.kernels.native.library import build_all
from clicktrain.kernels.sparse_conv2d import PackedConv2d

GLOBAL_HOOKS = (
    torch_module._global_backward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_forward_hooks,
    torch_module._global_forward_hooks_always_called,
    torch_module._global_forward_hooks_with_kwargs,
)
"""PyTorch's tables of hooks on all modules; the function that looks at them is not in 2.6."""
ROOT = "base"
"""Name under which the model hangs in lowered graphs: they find layers and parameters where the model has
them at the time of a call, not where they were when it was traced."""
_STEPS = "steps"
_CONSTANTS = "constants"


@dataclass(frozen=True, slots=True, eq=False)
class Lowered:
    """A graph that runs, and the modules that it stands for.

    Attributes:
        run: as the model's ``forward``.
        watched: modules that are not called any more: layers that run as a step, and those traced through.
        guards: what has to be as it was.
        tables: hook tables of ``watched``.
        parameter: (layer, name, dtype, device) of the one parameter that shows whether the model moved.
        plan: by which it was lowered; layers whose kernels cannot be built are plain in it.
        unable: packed layers whose gradients of all weights, where wanted, it does not compute.
    """

    run: fx.GraphModule
    watched: tuple[nn.Module, ...]
    guards: Guards
    tables: tuple[Mapping[int, object], ...]
    parameter: tuple[nn.Module, str, torch.dtype, torch.device] | None = None
    plan: LoweringPlan | None = None
    unable: tuple[nn.Module, ...] = ()

    def collects(self) -> bool:
        """Whether it computes all that is wanted of packed layers now."""
        return not any(getattr(layer, "dense_gradient", None) is not None for layer in self.unable)

    def current(self) -> bool:
        """Whether layers, what they read, dtype and device are as they were when the model was lowered."""
        if self.parameter is not None:
            module, name, dtype, device = self.parameter
            parameter = module._parameters.get(name)
            if parameter is None or parameter.dtype is not dtype or parameter.device != device:
                return False
        return self.guards.hold()

    def hooked(self) -> bool:
        """Whether hooks were added to layers that are not called any more."""
        anywhere = any(GLOBAL_HOOKS)
        if not (anywhere or any(self.tables)):
            return False
        return anywhere or any(map(watched, self.watched))


def lower(traced: ModelGraph, plan: LoweringPlan, dtype: torch.dtype) -> Lowered:
    """Rewrite a traced model so that units run where the plan says; what the plan does not name runs plain.

    All kernels are built and loaded here. Units whose kernels cannot be built run plain, and the failures are
    reported. Tilings are for images of the size that they were measured on; ``dtype`` is the parameters'.
    """
    units, _ = find_units(traced)
    choices = plan.by_layer()
    writer = _Writer(traced, plan, dtype)
    stepped = []
    for unit in units:
        choice = choices.get(unit.name)
        if choice is not None and choice.kind == unit.kind and not _unpacked(unit, choice):
            if choice.layout != PLAIN and runs_in(unit, LAYOUTS[choice.layout]):
                writer.moved.update(dict.fromkeys(unit.nodes, unit))
                stepped.append(unit)
            elif unit.kind == "conv" and (choice.impl or choice.dense != DENSE[0]):
                writer.own[unit.output] = unit
                stepped.append(unit)
    for name, norm in convolutions_before_norms(stepped).items():
        if choices[name].statistics:
            writer.joined[norm.inputs[0]] = norm
    writer.biased = _biases_before_activations(stepped, choices)
    layers = [module for _, module in modules_in(stepped, traced)]
    parameter = None
    if conv := next((one for one in layers if isinstance(one, (PackedConv2d, nn.Conv2d))), None):
        name = "values" if isinstance(conv, PackedConv2d) else "weight"
        parameter = (conv, name, dtype, conv.get_parameter(name).device)
    inside = [traced.model.get_submodule(path) for path in traced.entered if path]
    unseen = tuple(dict.fromkeys((*layers, *inside)))
    tables = tuple(getattr(module, name) for module in unseen for name in HOOK_TABLES)
    run = writer.write()
    own = [step for step in writer.steps.modules() if isinstance(step, steps.SparseConv)]
    unable = tuple(step.layer for step in own if not step.collects)
    lowered = Lowered(run, unseen, Guards(traced, layers), tables, parameter, plan, unable)
    # Side by side now rather than one by one when they are first called.
    failed = build_all([text for texts in (*writer.needs.values(), *writer.sums.values()) for text in texts])
    return lower(traced, _without(plan, units, writer, failed), dtype) if failed else lowered


def _without(
    plan: LoweringPlan, units: Sequence[Unit], writer: _Writer, failed: Mapping[str, KernelError]
) -> LoweringPlan:
    unusable = {
        name: str(next(failed[text] for text in texts if text in failed))
        for name, texts in writer.needs.items()
        if any(text in failed for text in texts)
    }
    left = [unit for unit in units if unit in writer.moved.values() and unit.name not in unusable]
    if unusable and not any(unit.kind == "conv" for unit in left):
        # Conversions to and fro would pay for nothing.
        cause = next(iter(unusable.values()))
        unusable |= {unit.name: cause for unit in left}
    apart = {name for name, texts in writer.sums.items() if any(text in failed for text in texts)}
    apart |= {name for name, norm in convolutions_before_norms(units).items() if norm.name in unusable}
    return plan.without(unusable, apart)


def _biases_before_activations(
    units: Sequence[Unit], choices: Mapping[str, Choice]
) -> dict[fx.Node, steps.Convolution]:
    """Convolutions with a bias that only an activation with a kernel reads, in the same layout."""
    made = {unit.output: unit for unit in units if unit.kind == "conv"}
    found = {}
    for unit in units:
        conv = made.get(unit.inputs[0])
        if conv is None or unit.kind != "elementwise" or unit.activation == NONE:
            continue
        layout = choices[unit.name].layout
        alike = layout == choices[conv.name].layout and LAYOUTS[layout].activation is not None
        if alike and len(conv.output.users) == 1 and conv_of(conv).bias is not None:
            found[conv.output] = conv_of(conv)
    return found


def _unpacked(unit: Unit, choice: Choice) -> bool:
    """Whether a layer has become dense since it was chosen to run sparse: that choice is void."""
    return isinstance(unit.module, nn.Conv2d) and choice.density < 1


class _Writer:
    """Copies a graph node by node; each value is in one layout, or in several once they are wanted."""

    def __init__(self, traced: ModelGraph, plan: LoweringPlan, dtype: torch.dtype) -> None:
        self.indifferent = {node for unit in find_units(traced)[0] for node in unit.nodes}
        """Operations that take any memory format; the model's own code gets the one that it is used to."""
        self.traced, self.plan, self.choices, self.dtype = traced, plan, plan.by_layer(), dtype
        self.moved: dict[fx.Node, Unit] = {}
        """Nodes that run in another layout."""
        self.own: dict[fx.Node, Unit] = {}
        """Convolutions in the plain layout that run otherwise than by the model's layer."""
        self.joined: dict[fx.Node, Unit] = {}
        """By a convolution's node the batch norm that it takes the statistics of: both run there."""
        self.graph = fx.Graph()
        self.steps = nn.Module()
        self._plain: dict[fx.Node, fx.Node] = {}
        self._inside: dict[fx.Node, dict[str, fx.Node]] = {}
        """Values in other layouts, by layout."""
        self._strange: set[fx.Node] = set()
        """Nodes whose plain values may be in another memory format than in the model."""
        self._usual: dict[fx.Node, fx.Node] = {}
        self._images: dict[fx.Node, fx.Node] = {}
        """Number of images of a value in another layout."""
        self.biased: dict[fx.Node, steps.Convolution] = {}
        """Convolutions, by their nodes, whose bias the activation behind them adds."""
        self.needs: dict[str, list[str]] = {}
        """C texts by the name of the unit that needs them."""
        self.sums: dict[str, list[str]] = {}
        """C texts by the name of the convolution that takes statistics by them."""

    def held(self, layout: Layout) -> torch.dtype:
        return held_dtype(layout.name, self.plan.activations, self.dtype)

    def write(self) -> fx.GraphModule:
        for node in self.traced.graph.nodes:
            unit = self.moved.get(node)
            if unit is not None:
                if node is unit.output:
                    self._write_inside(unit, LAYOUTS[self.choices[unit.name].layout])
            elif node in self.own:
                self._plain[node] = self._write_plain_conv(node, self.own[node])
                self._strange.add(node)
            elif node in self.indifferent:
                self._plain[node] = self._copy(node, self.plain)
                if any(source in self._strange or source in self._inside for source in node.all_input_nodes):
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
        usual = node not in self._inside or known is torch.contiguous_format
        if len(shape_of(node)) != 4 or (usual and node not in self._strange):
            return self.plain(node)
        if node not in self._usual:
            self._usual[node] = self.graph.call_function(steps.in_format, (self.plain(node), known))
        return self._usual[node]

    def plain(self, node: fx.Node) -> fx.Node:
        """The value as [N, C, H, W], converted if need be."""
        if node not in self._plain:
            name, inside = next(iter(self._inside[node].items()))
            out = self.graph.call_function(LAYOUTS[name].leave, (inside, self._images[node]))
            self._plain[node] = self.graph.call_method("to", (out, self.dtype))
        return self._plain[node]

    def inside(self, node: fx.Node, layout: Layout) -> fx.Node:
        known = self._inside.setdefault(node, {})
        if layout.name not in known:
            x = self.plain(node) if known else self._plain[node]
            if node not in self._images:
                self._images[node] = self.graph.call_method("size", (x, 0))
            held = self.held(layout)
            known[layout.name] = self._call(
                f"{layout.name}_{x.name}", steps.Enter(layout.enter(held), held), x
            )
        return known[layout.name]

    def _write_inside(self, unit: Unit, layout: Layout) -> None:
        if unit.output in self.joined:
            return
        if unit.kind == "batch_norm" and unit.inputs[0] in self.joined:
            self._write_joined(unit, layout)
            return
        self._need(unit, layout)
        x, *others = [self.inside(node, layout) for node in unit.inputs]
        n = self._images[unit.inputs[0]]
        node, layer = unit.output, unit.module
        if unit.kind == "global_pool":
            keepdim = len(shape_of(node)) == 4
            assert layout.image_mean is not None
            self._plain[node] = self.graph.call_function(layout.image_mean, (x, n, keepdim, self.dtype))
            return
        if unit.kind == "conv":
            step = self._conv(unit, layout)
            step.bias_later = node in self.biased
            y = self._call(unit.name, step, x)
        elif unit.kind == "batch_norm":
            y = self._call(unit.name, _norm(unit, layout), x, n, *others)
        elif layout.max_pool is not None and (pooling := max_pooling(unit)) is not None:
            y = self._call(unit.name, steps.MaxPool(pooling, layout.max_pool), x)
        elif unit.kind == "pool":
            assert layout.view is not None
            view = self.graph.call_function(layout.view[0], (x,))
            pooled = self._copy(node, lambda _: view)
            y = self.graph.call_function(layout.view[1], (pooled, x))
        elif unit.kind == "elementwise" and unit.activation != NONE and layout.activation is not None:
            conv = self.biased.get(unit.inputs[0])
            y = self._call(unit.name, steps.Activation(unit.activation, layout.activation, conv), x, n)
        elif layer is not None:
            y = self._call(unit.name, steps.Elementwise(layer), x)
        else:
            y = self._copy(node, lambda source: self.inside(source, layout))
        self._inside[node] = {layout.name: y}
        self._images[node] = n

    def _write_joined(self, norm: Unit, layout: Layout) -> None:
        """A convolution and its batch norm, where the norm stands: what it adds may come in between."""
        conv = self.moved[norm.inputs[0]]
        x, *others = [self.inside(node, layout) for node in (*conv.inputs, *norm.inputs[1:])]
        n = self._images[conv.inputs[0]]
        step = steps.ConvBatchNorm(self._conv(conv, layout), _norm(norm, layout))
        self.sums[conv.name] = list(step.conv.kernels.statistics_sources)
        self._need(norm, layout)
        self._inside[norm.output] = {layout.name: self._call(norm.name, step, x, n, *others)}
        self._images[norm.output] = n

    def _conv(self, unit: Unit, layout: Layout | None) -> steps.SparseConv:
        layer, shape, choice = conv_of(unit), shape_of(unit.inputs[0]), self.choices[unit.name]
        held = self.dtype if layout is None else self.held(layout)
        problem = ConvProblem.of_layer(layer, shape, activations=held)
        impl = choice.implementation
        assert impl is not None
        tilings = dict(choice.tilings) if choice.image == shape[1:] else {}
        step = steps.SparseConv(layer, impl, problem, tilings)
        self._need(unit, layout, *step.kernels.sources.values())
        return step

    def _need(self, unit: Unit, layout: Layout | None, *texts: str) -> None:
        self.needs[unit.name] = [*texts]
        if layout is not None:
            passes, held = (("layout", 0), pass_of(unit)), self.held(layout)
            self.needs[unit.name] += [
                layout.sources[one[0]](held, one[1]) for one in passes if one and one[0] in layout.sources
            ]

    def _write_plain_conv(self, node: fx.Node, unit: Unit) -> fx.Node:
        layer, choice = conv_of(unit), self.choices[unit.name]
        step: nn.Module
        if choice.impl:
            step = self._conv(unit, None)
        else:
            memory, dtype = choice.dense.split()
            step = steps.DenseConv(layer, memory == "channels_last", dtype == "bf16")
        return self._call(str(node.target), step, self.plain(node.all_input_nodes[0]))

    def _call(self, name: str, step: nn.Module, *arguments: fx.Node) -> fx.Node:
        key = name.replace(".", "_").replace("#", "_call")
        while key in self.steps._modules:
            key += "_"
        self.steps._modules[key] = step
        return self.graph.call_module(f"{_STEPS}.{key}", arguments)


def _norm(unit: Unit, layout: Layout) -> steps.BatchNorm:
    assert isinstance(unit.module, nn.BatchNorm2d)
    assert layout.batch_norm is not None
    pooling = max_pooling(unit) if unit.pooled else None
    return steps.BatchNorm(unit.module, layout.batch_norm, unit.activation, pooling)
