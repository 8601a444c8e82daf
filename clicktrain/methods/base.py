"""`Method`: what every pruning method inherits; and the names that methods are written with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from clicktrain.latency.network_times import MeasureMasks
from clicktrain.methods.contract import (
    Action,
    ApplyMasks,
    FreezeMasks,
    LayerPlan,
    MethodHooks,
    PruningPlan,
    Reconfigure,
    Record,
    RestoreTensors,
    RunLength,
    S,
    SilenceChannels,
    StepInfo,
    hard_prune,
    plan_rows,
)
from clicktrain.methods.driver.pruner import Pruner

__all__ = [
    "Action",
    "ApplyMasks",
    "FreezeMasks",
    "LayerPlan",
    "Method",
    "PruningPlan",
    "Reconfigure",
    "Record",
    "RestoreTensors",
    "RunLength",
    "SilenceChannels",
    "StepInfo",
    "hard_prune",
    "plan_rows",
]


class Method(MethodHooks[S]):
    """A pruning method: a frozen dataclass of settings that can be attached to a training loop."""

    def attach(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        epochs: int,
        steps_per_epoch: int,
        packed: bool = False,
        example: Any = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        measure: MeasureMasks | None = None,
        accelerate: bool | None = None,
    ) -> Pruner:
        """Hook this method into a training loop: two lines, this one and `Pruner.observe`.

        Args:
            model: the network, already on its device.
            optimizer: any torch optimizer over its parameters, or a list of all that train it (how several
                count: `Pruner`). An optimizer that wraps another (SAM, Lookahead) is given alone.
            epochs: length of the run.
            steps_per_epoch: batches per epoch, each with a call of `Pruner.observe`.
            packed: train on packed values after the hard prune (modules and parameters are then replaced);
                False keeps dense tensors with zeros.
            example: batch of inputs for methods that remove channels: a tensor [N, C, H, W], a tuple of
                positional arguments or a dict of keyword arguments; by default from the first forward pass.
            on_event: called with every decision as a JSON-able dict; typed events: `Pruner.subscribe`.
            measure: times the network with masks, for ClickTrain with a latency as its target:
                ``clicktrain.train.MaskedLatency(model, example)``; without it predictions are believed.
            accelerate: True packs, and calls of the network run on the fast kernels from then on (after the
                hard prune; from the first step where masks move), until `Pruner.finish` hands it back plain.
                By default a packed network on a CPU does so where at least a minute of work is left.

        Raises:
            UserError: what is asked for cannot be done on this network, with this optimizer or in a run of
                this length; or the network or an optimizer has a method attached that is not finished.
        """
        length = RunLength(epochs, steps_per_epoch)
        return Pruner(self, model, optimizer, length, packed, example, on_event, measure, accelerate)
