"""PruneTrain with a target: how strong the lasso is, and what a reconfiguration may remove.

The paper fixes the coefficient at the first step and takes what comes out (4.1); in a run of 20 epochs that
is nothing. Here a share of the inference FLOPs or parameters is asked for, and the coefficient follows:

* The first epoch trains with the paper's coefficient (Eq. (3)), as a start value.
* At the beginning of every further epoch the channels are ranked by the norm that has to vanish for them to
  go, and ``q(s)`` is the norm of the last one that has to go for the share s to be left. The share is to fall
  in a line, from 1 after a third of the time to the target at the target's epoch. If nothing but the lasso
  moved the norms, the coefficient ``q(s) / (steps until then * mean learning rate of the last epoch)`` would
  bring ``q(s)`` to zero in time; the coefficient is the largest of these over the epochs to come.
* Gradients move the norms too. By how much they pulled ``q`` back in the last epoch is measured, and added to
  what the lasso has to do in the next.
* The largest channels of each layer, its floor, are not penalised, so that no layer dies.
* A reconfiguration removes the channels that are zero, but none beyond the target.
* At the target's epoch what is still missing is removed, the smallest norms first, and the lasso ends: the
  rest of the run trains the smaller network (the paper's fine-tuning without lasso, 5.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clicktrain.methods.channels.target import NEAR, ChannelTarget, renamed
from clicktrain.surgery import SurgeryPlan

BEGIN = 1 / 3
"""Share of the time to the target in which nothing has to go."""
MOST_PULL = 3.0
"""What gradients pulled back counts at most this many times what the lasso has to do without them."""

MOST_CHANGE = 1.5
"""The coefficient changes by this factor at most between two epochs: norms answer slowly."""


@dataclass(slots=True)
class TargetState:
    """State of the steering between steps.

    Attributes:
        dense: cost of the network as it was at first, None until it has been seen.
        widths: channels of its layers, see `channel_target.original_widths`.
        share: of the cost that is left after the last reconfiguration.
        met: nothing more has to go.
        steered: epoch for which the coefficient was set last.
        steps, rates: optimizer steps of the running epoch, and the sum of their learning rates.
        water: norm of the last channel that had to go when the coefficient was set last, None before.
        held: channels that are not penalised, per group.
        held_for: epoch for which they were chosen last, where there is no target.
    """

    dense: float | None = None
    widths: dict[str, int] = field(default_factory=dict)
    share: float = 1.0
    met: bool = False
    steered: int = 0
    steps: int = 0
    rates: float = 0.0
    water: float | None = None
    held: dict[str, Tensor] = field(default_factory=dict)
    held_for: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors and numbers."""
        return {
            "dense": self.dense, "widths": dict(self.widths), "share": self.share, "met": self.met,
            "steered": self.steered, "steps": self.steps, "rates": self.rates,
            "water": self.water, "held": dict(self.held), "held_for": self.held_for,
        }  # fmt: skip

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> TargetState:
        """Inverse of `state_dict`."""
        held = {name: mask.to("cpu", copy=True) for name, mask in saved["held"].items()}
        return cls(**{**saved, "widths": dict(saved["widths"]), "held": held})

    def follow(self, plan: SurgeryPlan) -> None:
        """Channels have gone: layers may have other names."""
        self.widths = renamed(self.widths, plan)


def steered_coefficient(
    target: ChannelTarget, state: TargetState, coefficient: float, epoch: int, last: int
) -> float:
    """The coefficient for an epoch that begins; resets its step count and the channels it leaves out.

    Args:
        target: of the network as it is.
        state: with the steps of the epoch before.
        coefficient: of the epoch before.
        epoch: finished epochs.
        last: finished epochs when the target is to be met.
    """
    norms = target.norms()
    state.held = target.held(norms)
    coming = range(epoch + 1, max(last, epoch + 1) + 1)
    lines = target.water_lines(norms, [wanted_share(target.share, e, last) for e in coming])
    need = max(line / (e - epoch) for line, e in zip(lines, coming, strict=True))
    reach, state.steps, state.rates = state.rates, 0, 0.0
    first, before, state.water = state.water is None, state.water or 0.0, lines[-1]
    if reach <= 0:
        return 0.0
    if first:
        return need / reach
    pulled = lines[-1] - (before - coefficient * reach)
    wanted = (need + min(max(pulled, 0.0), MOST_PULL * need)) / reach
    return min(max(wanted, coefficient / MOST_CHANGE), coefficient * MOST_CHANGE)


def wanted_share(target: float, epoch: float, last: float) -> float:
    """The share of the cost that is to be left after an epoch."""
    first = BEGIN * last
    done = (epoch - first) / (last - first)
    return 1 - (1 - target) * min(max(done, 0.0), 1.0)


def held_indices(target: ChannelTarget, held: Mapping[str, Tensor]) -> dict[str, dict[int, list[int]]]:
    """Layer -> dimension -> indices of the channels that are held."""
    found: dict[str, dict[int, list[int]]] = {}
    for group in target.groups:
        mask = held.get(group.name)
        if mask is None or len(mask) != group.size:
            continue
        for member in group.members:
            own = [i for channel in mask.nonzero().flatten().tolist() for i in member.indices[channel]]
            found.setdefault(member.name.removesuffix(".weight"), {}).setdefault(member.dim, []).extend(own)
    return found


Plan = Callable[[Mapping[str, Tensor], bool], SurgeryPlan]
"""Makes a plan from zeros: with channels that stay, and with or without removing layers."""


def plan_within(
    target: ChannelTarget, make: Plan, fallback: Plan, *, round_to: int, fill: bool
) -> SurgeryPlan:
    """The channels that are zero, as far as the target allows; with ``fill`` as many as it takes.

    Args:
        target: of the network as it is.
        make: plans from zeros.
        fallback: the same where only channels are cut, so that the cost is exactly as predicted.
        round_to: multiple of the widths.
        fill: set further channels to zero, by the smallest norm, until the target is met.
    """
    norms = target.norms()
    stays = target.held(norms)
    plan = make(stays, True)
    share = target.share_after(plan)
    if share >= target.share - NEAR / 10 and not (fill and share > target.share + NEAR):
        return plan
    if share >= target.share:
        target.zero_(target.choose(target.order(norms), round_to, plan))
        filled = make(stays, True)
        if target.share_after(filled) >= target.share - NEAR / 10:
            return filled
        norms = target.norms()
    # What is zero goes beyond the target: the largest of it, and layers, stay.
    dead = target.removed_by(make(stays, False))
    order = [(norm, channel) for norm, channel in target.order(norms) if channel in dead]
    return fallback(target.staying(target.choose(order, round_to)), False)


@torch.no_grad()
def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Of all their elements, 0-dim float32."""
    return torch.stack([tensor.detach().float().square().sum() for tensor in tensors]).sum()
