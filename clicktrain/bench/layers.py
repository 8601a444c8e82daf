"""Speedup of a finished run's network layer by layer, beside the dense network (PruneTrain 5.1).

The speedup of a layer may lag its FLOP reduction. Each layer is timed by itself, at its shapes in the whole
network, with the select and the scatter of channel gating that belong to it (4.2, figure 7); the rest is
batch norm, activations, additions, loss and optimizer.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clicktrain.accounting import LayerCost, count
from clicktrain.bench.gates import Calls, LayerGates, gate_text, watch_calls, with_gates
from clicktrain.bench.runs import RunRow, network_call, random_batch
from clicktrain.bench.timing import Progress, autocast, channels_last, median_ms
from clicktrain.bench.timing import to_json as to_json
from clicktrain.errors import UserError
from clicktrain.latency.timer import clock_of
from clicktrain.sparsity.masks import conv_masks
from clicktrain.surgery import SurgeryPlan, read_recipe
from clicktrain.train import load_run
from clicktrain.train.restore import LoadedRun

TIMED_MS = 2.0
"""Calls of a small layer are repeated within one timing until it takes about so long."""
MOST_REPEATS = 64
_CPU = torch.device("cpu")
TRAINING = "training step"
PACKED = "packed: its kernel is part of the accelerated network"


@dataclass(frozen=True, slots=True)
class LayerTime:
    """A convolution or linear layer of the dense network, and its pruned counterpart.

    Attributes:
        layer: its name in the dense network.
        dense_shape, pruned_shape: of its weights, [F, C, R, S] or [O, I]; None where the layer is gone.
        dense_input, pruned_input: of what it reads in its first call, images first; None likewise.
        dense_flops, pruned_flops: per image, of the passes that are timed.
        dense_ms, pruned_ms: of a batch, gates included; 0 where the layer is gone, None where it was not
            timed.
        flops_share, time_share: of the whole dense network.
        share_of_saving: as in `RunRow`.
        excess_ms: what the layer takes over ``dense_ms * pruned_flops / dense_flops``.
        gates: of channel gating, "select 3 of 8" in front of the layer, "scatter 5 of 8" behind it.
        gate_ms: what these take by themselves, of ``pruned_ms``; None where they were not timed.
    """

    layer: str
    kind: str
    dense_shape: tuple[int, ...]
    pruned_shape: tuple[int, ...] | None
    dense_input: tuple[int, ...]
    pruned_input: tuple[int, ...] | None
    dense_flops: int
    pruned_flops: int
    flops_share: float
    dense_ms: float
    pruned_ms: float | None
    time_share: float
    share_of_saving: float | None
    excess_ms: float | None
    note: str = ""
    gates: tuple[str, ...] = ()
    gate_ms: float | None = 0.0


@dataclass(frozen=True, slots=True)
class LayerTable:
    """One network doing one thing, layer by layer, in the order in which the dense network calls them.

    Attributes:
        dense_name, pruned_name: memory order and precision that the layers are timed in.
        dense_ms, pruned_ms: of the whole networks, timed once more with the clock of the layers: where one
            thread does the work, its time on the processor.
        dense_rest_ms, pruned_rest_ms: the whole less its layers; None if some layer was not timed. What is
            timed by itself finds its data in the caches more often, so the rest is rather too large.
        rest_share_of_saving: time that the rest saves over the FLOPs that the network saves.
        rest_excess_ms: what the rest takes over ``dense_rest_ms * flops_ratio``.
    """

    run: str
    method: str
    what: str
    batch_size: int
    dense_name: str
    pruned_name: str
    layers: tuple[LayerTime, ...]
    dense_ms: float
    pruned_ms: float
    flops_ratio: float
    dense_rest_ms: float
    pruned_rest_ms: float | None
    rest_share_of_saving: float | None
    rest_excess_ms: float | None


def check_pruned(paths: Sequence[str], model: str | None = None) -> None:
    """Raise UserError if a run has nothing to compare layer by layer, before anything is measured."""
    for path in paths:
        loaded = load_run(path, model)
        if not loaded.folder.surgery.exists() and not loaded.masks:
            raise UserError(
                f"by_layer compares pruned layers with dense ones, and nothing was pruned in {path} "
                f"(method {loaded.config.method}): name runs that removed channels or weights"
            )


def bench_layers(
    rows: Sequence[RunRow],
    *,
    rounds: int = 7,
    model: str | None = None,
    progress: Progress = lambda text: None,
) -> list[LayerTable]:
    """Time the layers of networks that `bench_runs` has timed whole, in the memory order that was fastest.

    Dense and pruned layers are interleaved, layer after layer. Packed layers of an accelerated network are
    left out, with a note: they have no time of their own there. Settings and errors as for `bench_runs`.
    """
    tables = []
    for row in rows:
        progress(f"{row.run}: layers, {row.what}, batch {row.batch_size}")
        tables.append(_table(load_run(row.run, model), row, rounds))
    return tables


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """A network, what its layers read, their gates, and what they cost."""

    model: nn.Module
    calls: Calls
    costs: dict[str, LayerCost]
    name: str
    training: bool

    def gates(self, layer: str) -> LayerGates:
        """The gates of a layer."""
        return self.calls.gates.get(layer, LayerGates())

    def call(self, layer: str) -> Callable[[], object]:
        """The layer with its gates on random numbers, as often as the network calls it."""
        gates = self.gates(layer)
        if gates == LayerGates():
            return self._alone(self.model.get_submodule(layer), layer, layer)
        return self._alone(with_gates(self.model, layer, gates), gates.select or layer, layer)

    def gate_calls(self, layer: str) -> Callable[[], object]:
        """The gates of a layer by themselves."""
        gates = self.gates(layer)
        names = [name for name in (gates.select, gates.scatter) if name is not None]
        # What a scatter reads comes from a layer that is trained; what a select reads may be the image.
        alone = [self._alone(self.model.get_submodule(n), n, layer, n == gates.scatter) for n in names]

        def call() -> None:
            for one in alone:
                one()

        return call

    def _alone(
        self, module: nn.Module, reader: str, layer: str, trained: bool = False
    ) -> Callable[[], object]:
        """A copy of a module on random numbers like those that ``reader`` has read."""
        layout, _, half = self.name.partition(" ")
        module = copy.deepcopy(module)
        own = [torch.randn(read.shape).to(read.dtype) for read in self.calls.reads[reader]]
        if layout == "channels_last":
            module, *own = channels_last(module, *own)
        needed = self.training and (trained or self.costs[layer].grad_input_flops_dense > 0)
        return _call(module, [x.requires_grad_(needed) for x in own], bool(half), self.training)

    def whole(self, x: Tensor, y: Tensor) -> Callable[[], object]:
        """The network."""
        layout, _, half = self.name.partition(" ")
        return network_call(copy.deepcopy(self.model), x, y, layout, bool(half), self.training)

    def flops(self, layer: str) -> int:
        """FLOPs of the passes that are timed, per image."""
        cost = self.costs[layer]
        return cost.training_flops if self.training else cost.forward_flops


def _table(loaded: LoadedRun, row: RunRow, rounds: int) -> LayerTable:
    x, y = random_batch(loaded, row.batch_size)
    accelerated = row.pruned_name == "accelerated"
    own_name = row.dense_name if accelerated else row.pruned_name
    dense = _side(loaded.dense_model(), x, {}, row.dense_name, row.what)
    pruned = _side(loaded.model, x, loaded.masks, own_name, row.what)
    plans = read_recipe(loaded.folder.surgery) if loaded.folder.surgery.exists() else []
    total = sum(dense.flops(name) for name in dense.costs)
    masked = conv_masks(loaded.masks)
    whole = row.dense_ms, row.pruned_ms
    if not accelerated:
        sides = {"dense": dense.whole(x, y), "pruned": pruned.whole(x, y)}
        times = median_ms(sides, rounds, warmup=2, clock=clock_of(_CPU))
        whole = times["dense"], times["pruned"]
    layers = []
    for name in dense.costs:
        now = _name_now(name, plans)
        packed = accelerated and now in masked
        layers.append(_layer(name, now, dense, pruned, rounds, total, whole[0], packed))
    timed = [layer.pruned_ms for layer in layers if layer.pruned_ms is not None]
    before = whole[0] - sum(layer.dense_ms for layer in layers)
    after = whole[1] - sum(timed) if len(timed) == len(layers) else None
    share = None
    if after is not None and row.flops_ratio < 1 and before > 0:
        share = (1 - after / before) / (1 - row.flops_ratio)
    return LayerTable(
        row.run, row.method, row.what, row.batch_size, row.dense_name, row.pruned_name, tuple(layers),
        *whole, row.flops_ratio, before, after, share,
        None if after is None else after - before * row.flops_ratio,
    )  # fmt: skip


def _layer(
    name: str,
    now: str | None,
    dense: _Side,
    pruned: _Side,
    rounds: int,
    total: int,
    whole_ms: float,
    packed: bool,
) -> LayerTime:
    there = now if now in pruned.costs else None
    calls = {"dense": dense.call(name)}
    if there is not None and not packed:
        calls["pruned"] = pruned.call(there)
        if pruned.gates(there) != LayerGates():
            calls["gates"] = pruned.gate_calls(there)
    times = median_ms(calls, rounds, repeat=_repeats(calls["dense"]), clock=clock_of(_CPU))
    before, after = times["dense"], times.get("pruned", None if packed else 0.0)
    flops, left = dense.flops(name), 0 if there is None else pruned.flops(there)
    saved = 1 - left / max(flops, 1)
    cost = dense.costs[name]
    return LayerTime(
        layer=name,
        kind=cost.kind,
        dense_shape=cost.weight_shape,
        pruned_shape=None if there is None else pruned.costs[there].weight_shape,
        dense_input=tuple(dense.calls.reads[name][0].shape),
        pruned_input=None if there is None else tuple(pruned.calls.reads[there][0].shape),
        dense_flops=flops,
        pruned_flops=left,
        flops_share=flops / max(total, 1),
        dense_ms=before,
        pruned_ms=after,
        time_share=before / whole_ms,
        share_of_saving=(1 - after / before) / saved if after is not None and saved > 0 else None,
        excess_ms=None if after is None else after - before * left / max(flops, 1),
        note=PACKED if packed else "" if there is not None else "removed",
        gates=() if there is None else gate_text(pruned.model, pruned.gates(there)),
        gate_ms=times.get("gates", None if packed else 0.0),
    )


def _side(model: nn.Module, x: Tensor, masks: dict[str, Tensor], name: str, what: str) -> _Side:
    costs = {layer.name: layer for layer in count(model, x[:1], masks).layers}
    calls = watch_calls(model.eval(), x, list(costs), half=name.endswith(" bf16"))
    return _Side(model, calls, costs, name, what == TRAINING)


def _name_now(name: str, plans: Sequence[SurgeryPlan]) -> str | None:
    """Name of a layer of the dense network after all plans, None if it is gone."""
    weight: str | None = f"{name}.weight"
    for plan in plans:
        weight = None if weight is None else plan.new_name(weight)
    return None if weight is None else weight.removesuffix(".weight")


def _call(module: nn.Module, inputs: list[Tensor], half: bool, training: bool) -> Callable[[], object]:
    """Forward of a layer, with the gradients of its parameters and inputs if it is to train."""
    if not training:

        def predict() -> None:
            with torch.inference_mode(), autocast(half):
                for x in inputs:
                    module(x)

        return predict
    wanted = [p for p in module.parameters() if p.requires_grad]
    with autocast(half):
        gradients = [torch.randn_like(module(x)) for x in inputs]  # in the memory order of the output

    def train() -> None:
        for x, gradient in zip(inputs, gradients, strict=True):
            with autocast(half):
                y = module(x)
            if targets := [*wanted, x] if x.requires_grad else wanted:
                torch.autograd.grad(y, targets, gradient)

    return train


def _repeats(call: Callable[[], object]) -> int:
    """How many calls make one timing."""
    call()
    start = time.perf_counter()
    call()
    taken = max(1e3 * (time.perf_counter() - start), 1e-3)
    return min(max(1, math.ceil(TIMED_MS / taken)), MOST_REPEATS)
