"""A graph that is believed: it has been run beside the model, in both modes, twice, and did the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.graph.copying import users_hooks, working_copy
from clicktrain.graph.in_place import write_elsewhere
from clicktrain.graph.inputs import Inputs, owned
from clicktrain.graph.observe import Observation, difference, observe
from clicktrain.graph.random_state import own_random_numbers
from clicktrain.graph.trace import (
    ModelGraph,
    Recorder,
    TraceError,
    one_line,
    outside_autocast,
    record,
    trace_copy,
)
from clicktrain.graph.tracer import IsLeaf

_FEW = 4
"""Images that are enough to compare with."""

Modes = tuple[bool, ...]
"""``training`` of all modules, in the order of ``modules()``."""


class UnfaithfulError(Exception):
    """No graph of the whole model does what the model does; why, in a clause about the model's class."""


class ExampleError(Exception):
    """The model itself does not run on the example."""


@dataclass(frozen=True, slots=True, eq=False)
class Believed:
    """A graph that does what the model does.

    Attributes:
        graph: of the model in the modes that it is in. ``graph.opaque`` says which modules run as they are
            and why, in a clause about the module's class.
        few: inputs like the example's, of few images and with random numbers, to compare with.
        originals: what the model does with those, by the modes of all its modules, the present ones first.
    """

    graph: ModelGraph
    few: Inputs
    originals: dict[Modes, list[Observation]]


def believed_graph(
    model: nn.Module,
    inputs: Inputs,
    leaves: IsLeaf,
    *,
    all_modes: bool = True,
    own: Mapping[str, str] | None = None,
) -> Believed:
    """Trace a model, and leave out of the graph the smallest modules with which it would do something else.

    Works on copies; the model is not touched. Under autocast, the graph is the one without it.

    Args:
        model: to be traced in the modes that it is in.
        all_modes: find out what is to be left out in training and in evaluation mode as well.
        own: path -> reason, what is to be left out in any case.

    Raises:
        UnfaithfulError: the model's own ``forward`` would have to be left out.
        ExampleError: the model does not run on the inputs.
    """
    if torch.is_autocast_enabled("cpu"):
        with outside_autocast():
            # What autocast would have taken in a smaller dtype.
            whole = inputs.map(lambda x: x.float() if x.dtype in (torch.bfloat16, torch.float16) else x)
            return believed_graph(model, whole, leaves, all_modes=all_modes, own=own)
    modes = _modes(model, all_modes)
    few, now = _few_images(model, inputs)
    originals: dict[Modes, list[Observation] | None] = {modes[0]: now}
    opaque = {path: "has hooks" for path, module in model.named_modules() if path and users_hooks(module)}
    opaque.update(own or {})
    while True:
        graphs = []
        for flags in modes:
            if flags not in originals:
                try:
                    originals[flags] = original_calls(model, flags, few)
                except Exception:  # some networks have one mode only
                    originals[flags] = None
            expected = originals[flags]
            if expected is None:
                continue
            graph, unfaithful = _examine(model, flags, few, expected, leaves, opaque)
            if graph is None or "" in unfaithful:
                raise UnfaithfulError(unfaithful[""])
            graphs.append(graph)
            if unfaithful:
                opaque.update(unfaithful)
                break
        else:
            graph = graphs[0]
            shapes, sizes = record(graph.graph, graph.constants, copy_in_modes(model, modes[0]), inputs)
            graph = replace(graph, inputs=inputs, shapes=shapes, sizes=sizes)
            return Believed(graph, few, {flags: seen for flags, seen in originals.items() if seen})


def _examine(
    model: nn.Module,
    flags: Modes,
    few: Inputs,
    expected: list[Observation],
    leaves: IsLeaf,
    opaque: Mapping[str, str],
) -> tuple[ModelGraph | None, dict[str, str]]:
    """The graph in some modes, and what has to be left out of it: path -> reason."""
    try:
        graph = trace_copy(model, copy_in_modes(model, flags), few, leaves, dict(opaque))
    except TraceError as error:
        return None, {"": f"cannot be traced ({error})"}
    cannot = {
        path: f"cannot be traced ({reason})" for path, reason in graph.opaque.items() if path not in opaque
    }
    graph = replace(graph, opaque={**graph.opaque, **cannot})
    if graph.effects:
        return graph, graph.effects
    write_elsewhere(graph.graph)
    difference = _differs(graph, flags, few, expected)
    if not difference:
        return graph, cannot
    return graph, _smallest(model, graph, flags, few, leaves, opaque) or {"": _otherwise(difference)}


def run_graph(graph: ModelGraph, twin: nn.Module) -> Callable[..., Any]:
    """A traced graph as a function of the arguments of ``forward``, on the tensors of a copy of the model."""

    def call(*args: Any, **kwargs: Any) -> Any:
        recorder = Recorder(twin, graph.graph, graph.constants, note=False)
        return recorder.run(*Inputs(args, kwargs).tensors())

    return call


def copy_in_modes(model: nn.Module, flags: Modes) -> nn.Module:
    """A working copy with these ``training`` flags, in the order of ``modules()``."""
    twin = working_copy(model)
    for module, flag in zip(twin.modules(), flags, strict=True):
        module.training = flag
    return twin


def original_calls(model: nn.Module, flags: Modes, inputs: Inputs) -> list[Observation]:
    """What the model itself does with the inputs in these modes."""
    twin = copy_in_modes(model, flags)
    return observe(twin, twin.forward, inputs)


def _differs(graph: ModelGraph, flags: Modes, inputs: Inputs, expected: list[Observation]) -> str:
    twin = copy_in_modes(graph.model, flags)
    try:
        calls = observe(twin, run_graph(graph, twin), inputs)
    except Exception as error:  # whatever is wrong with the graph
        return one_line(error)
    return difference(calls, expected)


def _smallest(
    model: nn.Module, graph: ModelGraph, flags: Modes, few: Inputs, leaves: IsLeaf, opaque: Mapping[str, str]
) -> dict[str, str]:
    """The innermost module whose own graph does something else; {} if only the outermost forward does."""
    calls = _calls(model, graph.entered[1:], flags, few)
    of = {path: place for place, (path, _) in enumerate(model.named_modules())}
    for path in graph.entered[1:]:  # children return before their parents
        if path not in calls:
            continue
        module, start = model.get_submodule(path), of[path]
        own = flags[start : start + sum(1 for _ in module.modules())]
        inside = {p.removeprefix(f"{path}."): why for p, why in opaque.items() if p.startswith(f"{path}.")}
        try:
            expected = original_calls(module, own, calls[path])
            part = trace_copy(module, copy_in_modes(module, own), calls[path], leaves, inside)
            write_elsewhere(part.graph)
            difference = _differs(part, own, calls[path], expected)
        except Exception as error:
            difference = one_line(error)
        if difference:
            return {path: _otherwise(difference)}
    return {}


def _calls(model: nn.Module, paths: tuple[str, ...], flags: Modes, inputs: Inputs) -> dict[str, Inputs]:
    """What each of these modules gets in its first call."""
    twin = copy_in_modes(model, flags)
    calls: dict[str, Inputs] = {}

    def note(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.setdefault(path, owned(Inputs(args, kwargs)))

    for path in dict.fromkeys(paths):
        twin.get_submodule(path).register_forward_pre_hook(partial(note, path), with_kwargs=True)
    with own_random_numbers(inputs.tensors()), torch.no_grad():
        inputs.map(torch.clone).call(twin)
    return calls


def _otherwise(difference: str) -> str:
    return f"does something at each call that a graph does not hold: {difference}"


def _modes(model: nn.Module, all_modes: bool) -> list[Modes]:
    """The modes that the model is in, and those that ``train()`` and ``eval()`` put it in."""
    modes = [tuple(module.training for module in model.modules())]
    for training in (True, False) if all_modes else ():
        twin = working_copy(model, tensors=False)
        twin.train(training)
        flags = tuple(module.training for module in twin.modules())
        if flags not in modes:
            modes.append(flags)
    return modes


def _few_images(model: nn.Module, inputs: Inputs) -> tuple[Inputs, list[Observation]]:
    """The first images of the inputs, if the model takes so few, and what it does with them.

    Raises:
        ExampleError: the model does not run on the inputs either.
    """
    inputs = inputs.map(_varied)
    sizes = {tensor.shape[0] for tensor in inputs.tensors() if tensor.dim()}
    flags = _modes(model, all_modes=False)[0]
    if len(sizes) == 1 and sizes.pop() > _FEW:
        few = inputs.map(lambda tensor: tensor[:_FEW] if tensor.dim() else tensor)
        with contextlib.suppress(Exception):  # it may want whole batches
            return few, original_calls(model, flags, few)
    try:
        return inputs, original_calls(model, flags, inputs)
    except Exception as error:
        raise ExampleError(one_line(error)) from error


def _varied(tensor: Tensor) -> Tensor:
    """Random numbers instead of constants, of which a batch norm makes noise and a comparison nothing."""
    tensor = tensor.detach()
    if not tensor.is_floating_point() or tensor.numel() < 2 or float(tensor.max()) > float(tensor.min()):
        return tensor
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)
