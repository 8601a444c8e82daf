"""What belongs to a layer's time beside the layer: select and scatter of channel gating (PruneTrain 4.2).

A gated branch copies at both ends: its first convolutions read channels that were selected from the stage,
and behind its last one, or the batch norm there, its channels are put at their places, zeros elsewhere. Which
gate is whose is seen in one forward pass, by the tensors that go from module to module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clicktrain.bench.timing import autocast
from clicktrain.surgery.layers import ChannelScatter, ChannelSelect


class Read(NamedTuple):
    """What a module has read in a call."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass(slots=True)
class LayerGates:
    """Module paths of the gates in front of a layer and behind it, None where there is none."""

    select: str | None = None
    scatter: str | None = None


@dataclass(slots=True)
class Calls:
    """One forward pass: what each module reads, call by call, and the gates of layers."""

    reads: dict[str, list[Read]] = field(default_factory=dict)
    gates: dict[str, LayerGates] = field(default_factory=dict)


def watch_calls(model: nn.Module, x: Tensor, layers: Collection[str], half: bool = False) -> Calls:
    """Run a network once, in the mode that it is in, and see what its layers and gates read.

    Args:
        model: not changed.
        x: images [N, C, H, W].
        layers: module paths of the layers that are timed.
        half: under bfloat16 autocast.

    Returns:
        The reads of these layers and of all gates, in the order of their first calls. A gate is a layer's if
        that reads what the select gives, or makes what the scatter reads, with nothing but modules of one
        input between (a batch norm); the gates of other layers have no entry.
    """
    calls, made, into = Calls(), dict[int, str](), dict[str, list[int]]()
    alive: list[Any] = []  # no two tensors with one id

    def note(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(given, Tensor):
            calls.reads.setdefault(name, []).append(Read(given.shape, given.dtype))
            into.setdefault(name, []).append(id(given))
        made[id(output)] = name
        alive.extend((given, output))

    watched = [name for name, _ in _leaves(model)]
    with contextlib.ExitStack() as hooks, torch.no_grad(), autocast(half):
        for name in dict.fromkeys((*watched, *layers)):
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(partial(note, name), with_kwargs=True))
        model(x)
    gates = {name: module for name, module in _leaves(model) if isinstance(module, ChannelSelect)}
    for name, gate in gates.items():
        if name not in into:
            continue
        if isinstance(gate, ChannelScatter):
            if (maker := _maker(name, made, into, layers)) is not None:
                calls.gates.setdefault(maker, LayerGates()).scatter = name
            continue
        for layer in layers:
            if any(made.get(read) == name for read in into.get(layer, ())):
                calls.gates.setdefault(layer, LayerGates()).select = name
    calls.reads = {name: read for name, read in calls.reads.items() if name in layers or name in gates}
    return calls


def _leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if not [*module.children()])


def _maker(
    name: str, made: dict[int, str], into: dict[str, list[int]], layers: Collection[str]
) -> str | None:
    """The layer whose output a module reads, perhaps through other modules; None if there is none."""
    seen = set[str]()
    while name not in seen:
        seen.add(name)
        before = made.get(into[name][0]) if name in into else None
        if before is None or before in layers:
            return before
        name = before
    return None


def with_gates(model: nn.Module, layer: str, gates: LayerGates) -> nn.Module:
    """Select, layer and scatter one after the other, without the batch norm between; shared, not copied."""
    names = [name for name in (gates.select, layer, gates.scatter) if name is not None]
    return nn.Sequential(*(model.get_submodule(name) for name in names))


def gate_text(model: nn.Module, gates: LayerGates) -> tuple[str, ...]:
    """``("select 3 of 8", "scatter 5 of 8")``."""
    found = []
    for kind, name in (("select", gates.select), ("scatter", gates.scatter)):
        if name is not None:
            gate = model.get_submodule(name)
            assert isinstance(gate, ChannelSelect)
            found.append(f"{kind} {gate.channels.numel()} of {gate.size}")
    return tuple(found)
