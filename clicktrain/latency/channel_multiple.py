"""Channel multiple tuned for the device, by timing the pruned network at each candidate.

Removing channels leaves a layer with any number of them, 23 say. SIMD vectors and tensor cores work in
blocks: on some devices 24 channels are faster than 23, on others equally fast, and which layers it affects
depends on the widths that pruning leaves. So each multiple is applied to a copy of the network, and a
training step of the copies is timed, taking turns.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from clicktrain.comm.agreement import agreed
from clicktrain.formats.memory_format import keep_out_of_channels_last_
from clicktrain.graph import as_inputs
from clicktrain.graph.inputs import batch_size, blank, first_of_batch, first_tensor
from clicktrain.graph.prunable import PrunableLayer, SeenBatch
from clicktrain.latency.machine import measured_once
from clicktrain.latency.network_times import bare_copy, step_call
from clicktrain.latency.timer import clock_of, synchronized, timed_for
from clicktrain.surgery import SurgeryPlan, apply_surgery_
from clicktrain.surgery.steady import norm_alone_

FORMAT_VERSION = 2
MULTIPLES = (1, 2, 4, 8, 16, 32)
"""Candidates that widths are rounded up to."""
LIKED: Mapping[str, int] = {"cuda": 8}
"""By type of device, the multiple of channels that its matrix units take without padding; others take any.
16 bytes of 16-bit numbers (NVIDIA, Matrix Multiplication Background, Tensor Core requirements)."""
CPU_IMAGES = 16
"""Most images per CPU thread: from a few on, time is proportional to them."""
ROUNDS = (5, 30)
"""Least and most timed steps of each copy,"""
SECONDS = 1.5
"""for about this long."""
WORTH = 0.03
"""Share of the time that a larger multiple has to save: about the repeatability of measurements."""


class BatchForm(NamedTuple):
    """The properties of a batch that step time depends on: shape, strides and autocast's dtype."""

    shape: tuple[int, ...]
    strides: tuple[int, ...] = ()
    autocast: str | None = None

    @classmethod
    def of(cls, seen: SeenBatch) -> BatchForm:
        """The form of a batch."""
        dtype = None if seen.autocast is None else str(seen.autocast).removeprefix("torch.")
        first = first_tensor(as_inputs(seen.inputs))
        return cls(tuple(first.shape), first.stride(), dtype)

    def blank(self, like: Any) -> SeenBatch:
        """Zeros of this form, with the dtypes, devices and further tensors of other inputs."""
        inputs = blank(as_inputs(like), self.shape[0] if self.shape else None)
        first = first_tensor(inputs)
        x = first.new_zeros(self.shape)
        if self.strides:
            x = x.new_empty_strided(self.shape, self.strides).zero_()
        whole = inputs.map(lambda tensor: x if tensor is first else tensor)
        return SeenBatch(whole, None if self.autocast is None else getattr(torch, self.autocast))


def liked_multiple(layers: Sequence[PrunableLayer]) -> int:
    """The multiple of channels that the device of some layers takes without padding, see `LIKED`."""
    return max((LIKED.get(layer.weight.device.type, 1) for layer in layers), default=1)


@dataclass(frozen=True, slots=True)
class Rounding:
    """A multiple, and the training step and channels of the network rounded up to it."""

    multiple: int
    ms: float
    channels: int


@dataclass(frozen=True, slots=True)
class WidthChoice:
    """The multiple that pays, the rows of all candidates, the timed images, and autocast's dtype or float32.

    Multiples that leave the same network share one time.
    """

    chosen: int
    rows: tuple[Rounding, ...]
    images: int
    dtype: str

    def to_json(self) -> dict[str, Any]:
        """Plain lists, numbers and strings for `json.dumps`."""
        return {"version": FORMAT_VERSION, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> WidthChoice:
        """Inverse of `to_json`."""
        rows = tuple(
            Rounding(int(r["multiple"]), float(r["ms"]), int(r["channels"])) for r in document["rows"]
        )
        return cls(int(document["chosen"]), rows, int(document["images"]), str(document["dtype"]))


def fastest_multiple(
    model: nn.Module, seen: SeenBatch, plans: Mapping[int, SurgeryPlan], *, folder: Path | None = None
) -> WidthChoice | None:
    """Choose the multiple whose network trains fastest, by measurement; None if all leave the same network.

    A larger multiple is worth its extra channels if a step becomes at least 3% faster than with the best
    smaller one. The measurement is kept on disk, so that a repeated or resumed run decides alike.

    Args:
        seen: a training batch; on a CPU at most `CPU_IMAGES` per thread are timed.
        plans: multiple -> removal, the smallest multiple first.
    """
    left = {multiple: _left(plan) for multiple, plan in plans.items()}
    if len(set(left.values())) < 2:
        return None
    inputs = as_inputs(seen.inputs, model)
    device = first_tensor(inputs).device
    if device.type == "cpu":
        inputs = first_of_batch(inputs, CPU_IMAGES * torch.get_num_threads())

    def measure() -> WidthChoice:
        distinct = {text: plans[multiple] for multiple, text in reversed(left.items())}
        ms = step_ms(model, inputs, seen.autocast, distinct)
        rows = tuple(
            Rounding(multiple, ms[text], sum(row.outputs[1] for row in plans[multiple].layers))
            for multiple, text in left.items()
        )
        dtype = str(seen.autocast or torch.float32).removeprefix("torch.")
        return WidthChoice(best(rows), rows, batch_size(inputs), dtype)

    about = [
        FORMAT_VERSION,
        str(model),
        [[*tensor.shape, *tensor.stride()] for tensor in inputs.tensors()],
        str(seen.autocast),
        [[*p.shape, *p.stride()] for p in model.parameters()],
        [*left.items()],
    ]
    choice = measured_once("multiple", about, device, WidthChoice.from_json, measure, folder)
    (chosen,) = agreed([choice.chosen], device)
    return dataclasses.replace(choice, chosen=int(chosen))


def best(rows: Sequence[Rounding], worth: float = WORTH) -> int:
    """The multiple that pays: each larger one has to be faster than the best smaller one by ``worth``."""
    chosen = rows[0]
    for row in rows[1:]:
        if row.ms < (1 - worth) * chosen.ms:
            chosen = row
    return chosen.multiple


def step_ms(
    model: nn.Module, example: Any, autocast: torch.dtype | None, plans: Mapping[str, SurgeryPlan]
) -> dict[str, float]:
    """Median milliseconds of a training step of a copy after each plan; the copies take turns."""
    calls: dict[str, Callable[[], object]] = {}
    inputs = as_inputs(example, model)
    device = first_tensor(inputs).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), torch.inference_mode(False):
        for name, plan in plans.items():
            replica = bare_copy(model)
            apply_surgery_(plan, replica)
            keep_out_of_channels_last_(replica)
            norm_alone_(replica)
            calls[name] = synchronized(step_call(replica.train(), inputs, autocast), device)
        times = timed_for(calls, SECONDS, ROUNDS, clock=clock_of(device))
    return {name: statistics.median(ms) for name, ms in times.items()}


def _left(plan: SurgeryPlan) -> str:
    """The parts of a plan that the time of the pruned network depends on."""
    cuts = sorted((cut.name, cut.dim, len(cut.keep)) for cut in plan.cuts)
    gates = sorted((gate.name, gate.kind, len(gate.channels)) for gate in plan.gates)
    return json.dumps([cuts, sorted(layer.name for layer in plan.removed_layers), gates])
