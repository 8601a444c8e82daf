"""Detects networks that pruning has destroyed, by two signs that need no images, once per epoch.

* No gradient reaches any convolution although the loss is not small: layers without a nonzero weight cut
  every path, so that all outputs are equal and stay equal.
* The loss had fallen well below that of the untrained network, and has been back there for two epochs since
  weights were removed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.graph.adapters import dense_adapter

CHANCE = 0.95
"""A loss of at least this share of the first batch's is that of an untrained network."""
LEARNED = 0.7
"""A loss below this share of the first batch's means that the network had learned something."""
PATIENCE = 2
"""Epochs that the loss stays there."""
SMALL = 0.1
"""Below this share of the first batch's loss there may be no gradient left because all is learned."""


def no_gradient(model: nn.Module, loss: Tensor, first_loss: Tensor) -> str | None:
    """What is wrong, or None; called between backward and step. Synchronizes with the device once."""
    weights = [w for w in map(_convolution, model.modules()) if w is not None and w.grad is not None]
    if not weights:
        return None
    largest = torch.stack([w.grad.detach().abs().amax().float() for w in weights if w.grad is not None])
    # NaN gradients are another mistake, with an error of its own.
    reached, high = (largest.amax() != 0).item(), (loss > SMALL * first_loss).item()
    if reached or not high:
        return None
    return "no gradient reaches any convolution, so that all outputs are equal and stay so"


def _convolution(module: nn.Module) -> nn.Parameter | None:
    """Weight of a convolution, values of a packed one."""
    adapter, held = dense_adapter(module), module._parameters
    if adapter is None or adapter.kind != "conv":
        return None
    weight = held["values"] if "values" in held else held.get("weight")
    return weight if weight is not None and weight.numel() else None


def at_chance(
    losses: Sequence[float], first_loss: float, events: Sequence[Mapping[str, Any]]
) -> tuple[str, float] | None:
    """What is wrong with the loss, and the epoch of the removal; None if nothing is.

    Args:
        losses: mean training loss of every finished epoch.
        first_loss: of the first batch.
        events: all decisions so far.
    """
    for event in reversed(events):
        if not _removes(event):
            continue
        epoch = float(event["epoch"])
        before, after = losses[: int(epoch)], losses[int(-(-epoch // 1)) :]
        learned = min(before, default=first_loss) < LEARNED * first_loss
        stays = len(after) >= PATIENCE and all(loss >= CHANCE * first_loss for loss in after[-PATIENCE:])
        if learned and stays:
            return (
                f"since weights were removed the loss has been {after[-1]:.3g}, that of the untrained "
                f"network was {first_loss:.3g}",
                epoch,
            )
        if not learned:
            return None
    return None


def _removes(event: Mapping[str, Any]) -> bool:
    name = event.get("event")
    return name == "hard_prune" or (
        name == "reconfigured" and event.get("channels_after") != event.get("channels_before")
    )
