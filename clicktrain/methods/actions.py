"""What a method wants done, as data; the pruner carries it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from torch import Tensor

from clicktrain.graph.prunable import PrunableLayers
from clicktrain.runs.events import ABSENT, Event, HardPruneEvent, ReconfiguredEvent
from clicktrain.sparsity.masks import energy_outside, sparsity_of
from clicktrain.surgery import SurgeryPlan


class Record(NamedTuple):
    """Record a decision: a typed event (`clicktrain.runs.events`)."""

    event: Event


class ApplyMasks(NamedTuple):
    """Zero weights that later steps may change again. Masks are bool, of their weight's shape.

    ``forget``: also zero the optimizer state of the masked weights (momentum, moments).
    """

    masks: Mapping[str, Tensor]
    forget: bool = False


class FreezeMasks(NamedTuple):
    """Hard prune: zero the weights outside the masks, bool of the weights' shapes, for good."""

    masks: Mapping[str, Tensor]


class SilenceChannels(NamedTuple):
    """Zero whatever a plan would cut along the output channels of layers, without removing it.

    These are filters, their biases and the scale and shift of their batch norms; the channels then carry
    nothing. Later steps may change them again.
    """

    plan: SurgeryPlan


class Reconfigure(NamedTuple):
    """Remove channels and layers physically, from the model and its optimizer.

    ``event`` says what the method decided by; the pruner completes it with what came of it. ``checked``:
    measure how much the output of the last batch changes, in evaluation mode.
    """

    plan: SurgeryPlan
    event: ReconfiguredEvent = ReconfiguredEvent()
    checked: bool = False


class RestoreTensors(NamedTuple):
    """Write values into parameters and buffers, by name, and drop their optimizer state."""

    values: Mapping[str, Tensor]


Action: TypeAlias = Record | ApplyMasks | FreezeMasks | SilenceChannels | Reconfigure | RestoreTensors


def hard_prune(
    prunable: PrunableLayers,
    masks: Mapping[str, Tensor],
    *,
    compression_asked: float | None = ABSENT,
    sparsity_asked: float = ABSENT,
    layer_targets: Mapping[str, float] = MappingProxyType({}),
) -> list[Action]:
    """Freeze masks, and record what that cuts.

    Args:
        prunable: the layers as they are, their pruned weights not yet zero.
        masks: layer name -> bool of the weight's shape, True = kept.
        compression_asked: what the method was asked for, all convolution weights / kept ones; or
        sparsity_asked: over the layers with masks, which are then listed with their sparsities.
        layer_targets: layer name -> the sparsity that the layer was to have, where there is one.
    """
    layers = [layer for layer in prunable.layers if layer.name in masks]
    energies = [energy_outside(layer.weight, masks[layer.name]) for layer in layers]
    lost, whole = (sum(part) for part in zip(*energies, strict=True)) if energies else (0.0, 0.0)
    counted = [masks[layer.name] for layer in prunable.counted if layer.name in masks]
    pruned = sum(mask.numel() - int(mask.sum()) for mask in counted)
    event = HardPruneEvent(
        compression_asked=compression_asked,
        compression_reached=prunable.conv_weights / max(prunable.conv_weights - pruned, 1),
        energy_outside=lost / whole if whole else 0.0,
    )
    if sparsity_asked is not ABSENT:
        rows = []
        for layer in layers:
            wanted = {"target_sparsity": layer_targets[layer.name]} if layer.name in layer_targets else {}
            true = sparsity_of({layer.name: masks[layer.name]})
            rows.append({"name": layer.name, "shape": list(layer.shape), **wanted, "true_sparsity": true})
        event = dataclasses.replace(
            event, sparsity_asked=sparsity_asked, sparsity_reached=sparsity_of(masks), layers=rows
        )
    return [Record(event), FreezeMasks(dict(masks))]
