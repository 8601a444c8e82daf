"""The largest absolute weight of every channel, epoch by epoch (PruneTrain, figure 4).

channels.jsonl has one line per epoch, of the network after the epoch's last step. Where the epoch ends with
a reconfiguration, channels under the threshold are zero by then and nothing is removed yet. A line is
``{"epoch": 3, "outputs": {layer: [...]}, "inputs": {layer: [...]}}``, with a number of three digits for
every channel that can be removed; layers have the names of the original network. ``channels``, in the first
line and in the first one after a removal, says in the same form which channels of the original network these
are, until the next such line. A removed channel has its last number in the line of the epoch that removed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clicktrain.formats.atomic import append_jsonl
from clicktrain.methods.driver.publisher import ChannelsRemoved, EpochEnd
from clicktrain.surgery import OriginalChannels, original_channels, renumbered
from clicktrain.train.training_run import TrainingRun

SIDES = ("outputs", "inputs")
"""Names of the dimensions 0 and 1 of a weight."""


def watch_channels(run: TrainingRun) -> None:
    """Write a line at the end of every epoch in which a method pushes channels towards zero.

    Call it before a checkpoint is loaded, while the network is the original one.
    """
    log = _ChannelLog(run, original_channels(run.prepared.model))
    run.prepared.pruner.subscribe(log.renumber, ChannelsRemoved)
    run.prepared.pruner.subscribe(log.write, EpochEnd)


@dataclass
class _ChannelLog:
    """``numbers`` maps present channels to those of the original network."""

    run: TrainingRun
    numbers: dict[str, OriginalChannels]

    def renumber(self, removal: ChannelsRemoved) -> None:
        """Follow a removal of channels."""
        self.numbers = renumbered(self.numbers, removal.plan)

    def write(self, end: EpochEnd) -> None:
        """Write the line of an epoch; none where no channel is penalized."""
        pruner, state = self.run.prepared.pruner, self.run.state
        axes = {name: own for name, own in pruner.penalized_channels.items() if name in self.numbers}
        if not axes:
            return
        numbers: dict[str, dict[str, list[int]]] = {side: {} for side in SIDES}
        largest: dict[str, dict[str, list[float]]] = {side: {} for side in SIDES}
        for name, own in axes.items():
            layer, weight = self.numbers[name], pruner.model.get_parameter(f"{name}.weight")
            for axis in own:
                side, (indices, order) = SIDES[axis.dim], axis.first_indices().sort()
                numbers[side][layer.name] = [layer.numbers[axis.dim][i] for i in indices.tolist()]
                largest[side][layer.name] = _three_digits(axis.largest(weight)[order])
        line: dict[str, Any] = {"epoch": end.epoch}
        if state.channels_renumbered:
            line["channels"] = numbers
            state.channels_renumbered = False
        append_jsonl(self.run.folder.channels, {**line, **largest})


def _three_digits(values: Tensor) -> list[float]:
    """Round to three significant digits, which are short as text."""
    return [float(f"{value:.3g}") if value else 0 for value in values.tolist()]
