"""Where a training loop is: batches, epochs, losses; and whether pruning has destroyed the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.graph.adapters import dense_adapter
from clicktrain.methods.contract import RunLength

_COUNTS = ("seen", "epoch", "in_epoch", "stepped_epoch")
_LOSSES = ("first_loss", "last_loss", "epoch_loss")
"""Names of the attributes that are saved as they are."""


class Progress:
    """The counters and losses of a run; all of it is saved with the pruner.

    Attributes:
        length: of the run, with the batches of the running epoch.
        seen: batches observed.
        epoch: finished epochs.
        in_epoch: batches observed in the running epoch.
        stepped_epoch: finished epochs at the last step of the method.
        losses: of the batches since that step, 0-dim; one that is not finite counts as the one before.
        epoch_losses: mean loss of every finished epoch.
        first_loss, last_loss: of the first and the last batch.
        epoch_loss: sum over the running epoch.
    """

    def __init__(self, length: RunLength) -> None:
        self.length = length
        self.seen = self.epoch = self.in_epoch = self.stepped_epoch = 0
        self.losses: list[Tensor] = []
        self.epoch_losses: list[float] = []
        self.first_loss: Tensor | None = None
        self.epoch_loss: Tensor | None = None
        self.last_loss: Tensor | None = None

    @property
    def position(self) -> float:
        """Epochs done, with a fraction."""
        return self.epoch + self.in_epoch / self.length.steps_per_epoch

    @property
    def ends_epoch(self) -> bool:
        """Whether an epoch was closed since the last step."""
        return self.epoch > self.stepped_epoch

    def observe(self, loss: Tensor) -> None:
        """Count a batch."""
        last = torch.zeros_like(loss) if self.last_loss is None else self.last_loss
        loss = self.last_loss = torch.where(torch.isfinite(loss), loss, last)
        self.first_loss = loss.clone() if self.first_loss is None else self.first_loss
        self.losses.append(loss)
        self.epoch_loss = loss.clone() if self.epoch_loss is None else self.epoch_loss + loss
        self.seen += 1
        self.in_epoch += 1

    def stepped(self) -> None:
        """Note that the method has taken a step."""
        self.stepped_epoch = self.epoch
        self.losses = []

    def close_epoch(self) -> bool:
        """Close the epoch if all of its batches are observed; whether it was."""
        if self.epoch_loss is None or self.in_epoch != self.length.steps_per_epoch:
            return False
        self.epoch_losses.append(float(self.epoch_loss) / self.length.steps_per_epoch)
        self.epoch_loss = None
        self.epoch, self.in_epoch = self.epoch + 1, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        """The counters and losses as tensors, numbers and lists."""
        return {
            **{name: getattr(self, name) for name in (*_COUNTS, *_LOSSES)},
            "steps_per_epoch": self.length.steps_per_epoch,
            "losses": list(self.losses),
            "epoch_losses": list(self.epoch_losses),
        }

    def load_state_dict(self, saved: Mapping[str, Any], device: torch.device | None) -> None:
        """Inverse of `state_dict`; losses are moved to the device of the network."""
        self.length = RunLength(self.length.epochs, saved["steps_per_epoch"])
        for name in _COUNTS:
            setattr(self, name, saved[name])
        for name in _LOSSES:
            setattr(self, name, None if saved[name] is None else saved[name].to(device, copy=True))
        self.losses = [value.to(device, copy=True) for value in saved["losses"]]
        self.epoch_losses = list(saved["epoch_losses"])


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
    """What is wrong with the mean loss of every finished epoch, and the epoch of the removal; or None."""
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
            break
    return None


def _removes(event: Mapping[str, Any]) -> bool:
    name = event.get("event")
    return name == "hard_prune" or (
        name == "reconfigured" and event.get("channels_after") != event.get("channels_before")
    )
