"""Measured times of whole networks that take turns, in inference or in a training step."""

from __future__ import annotations

import copy
import statistics
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from clicktrain.comm.agreement import agreed
from clicktrain.graph import Inputs, as_inputs
from clicktrain.graph.copying import HOOK_TABLES
from clicktrain.graph.inputs import blank, first_tensor
from clicktrain.latency.timer import clock_of, synchronized, timed_for
from clicktrain.surgery import SurgeryPlan, apply_surgery_

Timed = Literal["inference", "step"]
"""The forward pass in evaluation mode, or a training step without the optimizer's part."""
ROUNDS = (7, 80)
"""Least and most measurements of a network,"""
SECONDS = 0.6
"""for about this long."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Milliseconds of the dense and of the pruned network, and the latter over the former.

    Times are the least of many. The ratio is the median over rounds, whose two times were taken one after the
    other, so that a machine that becomes busier changes little.
    """

    dense_ms: float
    pruned_ms: float
    ratio: float

    @classmethod
    def of(cls, dense: Sequence[float], pruned: Sequence[float]) -> Measured:
        """From the milliseconds of each round."""
        ratios = [after / before for before, after in zip(dense, pruned, strict=True)]
        return cls(min(dense), min(pruned), statistics.median(ratios))

    def agreed(self, device: torch.device) -> Measured:
        """What the first of several processes has measured."""
        return Measured(*agreed([self.dense_ms, self.pruned_ms, self.ratio], device))


class MeasureMasks(Protocol):
    """Measures the network with masks beside the dense one; see `clicktrain.compiler.MaskedLatency`."""

    def __call__(self, masks: Mapping[str, Tensor], batch: int, timed: Timed) -> Measured:
        """Times of a batch, with masks by layer name, bool of the weight's shape, True = kept."""
        ...


def measure_ms(model: nn.Module, example: Any, batch: int, timed: Timed = "inference") -> float:
    """Milliseconds of a batch; arguments as `network_times`."""
    (times,) = network_times([bare_copy(model)], example, batch, timed)
    (ms,) = agreed([min(times)], first_tensor(as_inputs(example)).device)
    return ms


def compare_ms(
    model: nn.Module, plan: SurgeryPlan, example: Any, batch: int, seconds: float = SECONDS
) -> Measured:
    """Inference times of a copy of a network and of a copy after a plan; arguments as `network_times`."""
    dense, pruned = bare_copy(model), bare_copy(model)
    apply_surgery_(plan, pruned)
    times = network_times([dense, pruned], example, batch, "inference", seconds)
    return Measured.of(*times).agreed(first_tensor(as_inputs(example)).device)


def network_times(
    models: Sequence[nn.Module], example: Any, batch: int, timed: Timed, seconds: float = SECONDS
) -> list[list[float]]:
    """Milliseconds of each network in each round, on batches of this many images.

    Args:
        models: copies that may change; they are put into the mode that is timed.
        example: input of one image or more, whose sizes and device count.
    """
    calls: dict[int, Callable[[], object]] = {}
    for number, model in enumerate(models):
        inputs = blank(as_inputs(example, model), batch)
        device = first_tensor(inputs).device
        weights = [p for p in model.parameters() if p.dim() == 4 and not p.is_contiguous()]
        if any(p.is_contiguous(memory_format=torch.channels_last) for p in weights):
            inputs = inputs.map(
                lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous()
            )
        model.train(timed == "step")
        call = step_call(model, inputs) if timed == "step" else torch.no_grad()(partial(inputs.call, model))
        calls[number] = synchronized(call, device)
    times = timed_for(calls, seconds, ROUNDS, clock=clock_of(device))
    return [times[number] for number in calls]


def step_call(model: nn.Module, inputs: Inputs, autocast: torch.dtype | None = None) -> Callable[[], object]:
    """A forward and backward pass; the gradients are dropped."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = first_tensor(inputs).device.type

    def step() -> None:
        with torch.enable_grad():
            with torch.autocast(kind, dtype=autocast, enabled=autocast is not None):
                outputs = inputs.call(model)
            tensors = [y for y in pytree.tree_leaves(outputs) if isinstance(y, Tensor) and y.requires_grad]
            torch.autograd.grad(tensors, trained, [torch.ones_like(y) for y in tensors], allow_unused=True)
        torch.clear_autocast_cache()  # inside another autocast the next step would find its casts there

    return step


def bare_copy(model: nn.Module) -> nn.Module:
    """A copy without gradients and hooks; objects that hooks refer to are not copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    modules = list(model.modules())
    hooks = [{name: getattr(module, name) for name in HOOK_TABLES} for module in modules]
    try:
        for module in modules:
            for name in HOOK_TABLES:
                setattr(module, name, OrderedDict())
        return copy.deepcopy(model, memo)
    finally:
        for module, kept in zip(modules, hooks, strict=True):
            for name, table in kept.items():
                setattr(module, name, table)
