"""PruneTrain with a target: how strong the lasso is, and what a reconfiguration may remove.

The paper fixes the coefficient at the first step and accepts the result (4.1); in a run of 20 epochs nothing
is removed. Here a share of the inference FLOPs or parameters is the target, and the coefficient follows it:

* The first epoch trains with the paper's coefficient (Eq. (3)), as a start value.
* At the beginning of every further epoch the channels are ranked by the norm that has to vanish before they
  can be removed, and ``q(s)`` is the norm of the last one to remove for the share s to be left. The share is
  to fall linearly, from 1 after a third of the time to the target at the target's epoch. If nothing but the
  lasso moved the norms, the coefficient ``q(s) / (steps until then * mean learning rate of the last epoch)``
  would bring ``q(s)`` to zero in time; the coefficient is the largest of these over the epochs to come.
* Gradients move the norms too. How far they pulled ``q`` back in the last epoch is measured and added to what
  the lasso has to do in the next.
* The largest channels of each layer, its floor, are not penalized, so that no layer vanishes.
* A reconfiguration removes the channels that are zero, but none beyond the target.
* At the target's epoch what is still missing is removed, the smallest norms first, and the lasso ends: the
  rest of the run trains the smaller network (the paper's fine-tuning without lasso, 5.1).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from clicktrain.graph.prunable import PrunableLayers
from clicktrain.methods.channels.costs import Cost
from clicktrain.methods.channels.lasso import Axes, LassoState
from clicktrain.methods.channels.target import NEAR, WORDS, ChannelTarget, original_widths, renamed
from clicktrain.methods.contract import StepInfo
from clicktrain.methods.outcome import NOTED, Target
from clicktrain.sparsity.channel_lasso import without_channels
from clicktrain.surgery import SurgeryPlan

BEGIN = 1 / 3
"""Share of the time to the target in which nothing has to go."""
MOST_PULL = 3.0
"""The pull of gradients counts at most this many times what the lasso has to do without them."""
MOST_OF_STEPS = 0.1
"""The lasso may take this share of what steps in proportion to the weights change, before a run is warned."""
MOST_CHANGE = 1.5
"""The coefficient changes by this factor at most between two epochs: norms respond slowly."""


@dataclass(slots=True)
class TargetState:
    """State of the steering between steps.

    Attributes:
        dense: cost of the unpruned network, None until it is known.
        widths: channels of its layers, see `clicktrain.methods.channels.target.original_widths`.
        share: of this cost, left after the last reconfiguration.
        met: no more channels have to be removed.
        steered: epoch for which the coefficient was set last.
        steps, rates: optimizer steps of the running epoch, and the sum of their learning rates.
        water: norm of the last channel to remove when the coefficient was set last, None before.
        held: channels that are not penalized, per group.
        held_for: epoch for which they were chosen last, where there is no target.
        view: the network as it is; follows from it and is not saved.
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
    view: ChannelTarget | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Steering:
    """A target for the cost of the network, and the channels of each layer that stay.

    Attributes:
        target: a cost and the share of it that is to be left; None where the penalty is fixed.
        floor: share of each layer's channels that stay, one at least. Without a target, layers of residual
            branches keep none, so that whole branches can be removed.
        both_sides: a channel is removed only if it is zero on both sides, not when no layer reads it.
    """

    target: tuple[Cost, float] | None
    floor: float
    both_sides: bool

    @property
    def what(self) -> str:
        """The cost, in words."""
        return "" if self.target is None else WORDS[self.target[0]]

    def view(self, state: TargetState, lasso: LassoState, prunable: PrunableLayers) -> ChannelTarget | None:
        """What may be removed from the network as it is; None if there is neither a target nor a floor."""
        if self.target is None and not self.floor:
            return None
        if state.view is None:
            assert prunable.model is not None
            what, share = self.target or ("flops", 0.0)
            state.view = ChannelTarget(
                prunable.model,
                prunable.example,
                what,
                share,
                penalized=lasso.axes or (),
                both_sides=self.both_sides,
                floor=self.floor,
                branches=self.target is not None,
                dense=state.dense,
                widths=state.widths or None,
            )
        return state.view

    def look(self, state: TargetState, lasso: LassoState, prunable: PrunableLayers, axes: Axes) -> None:
        """Take over the channels of the network as it is; the first time, check the target.

        Raises:
            UserError: the target cannot be reached.
        """
        lasso.axes = lasso.penalized = axes
        state.view = None
        view = self.view(state, lasso, prunable)
        if view is None:
            return
        if state.dense is None:
            if self.target is not None:
                view.check_reachable(f"target_{view.what}", self.floor)
            state.dense, state.widths = view.dense, original_widths(view.groups)
        if not state.held:
            state.held = view.held(view.norms())
        _hold(state, lasso, view)

    def follow(
        self, state: TargetState, lasso: LassoState, prunable: PrunableLayers, axes: Axes, plan: SurgeryPlan
    ) -> None:
        """Channels were removed: take over the smaller network, in which layers may have other names."""
        state.widths, state.held = renamed(state.widths, plan), {}
        self.look(state, lasso, prunable, axes)

    def begin_step(
        self, state: TargetState, lasso: LassoState, prunable: PrunableLayers, step: StepInfo, last: int
    ) -> None:
        """Set the coefficient for an epoch that begins; without a target, only the channels that are held.

        ``last``: finished epochs when the target is to be met.
        """
        view = self.view(state, lasso, prunable)
        if view is None:
            return
        if self.target is None:
            if state.held_for < step.epoch:
                state.held_for, state.held = step.epoch, view.held(view.norms())
                _hold(state, lasso, view)
            return
        if state.steered < step.epoch:
            state.steered, first = step.epoch, state.water is None
            lasso.coefficient = steered_coefficient(view, state, lasso.coefficient or 0.0, step.epoch, last)
            if first and step.norm_scaled and state.water:
                _warn_of_weak_steps(lasso.coefficient / state.water)
            _hold(state, lasso, view)
        state.steps, state.rates = state.steps + 1, state.rates + step.learning_rate

    def outcome(self, state: TargetState, round_to: int | None) -> Target:
        """What was asked for and what was reached, with a target."""
        assert self.target is not None
        asked, left, reason = self.target[1], state.share, ""
        if abs(left - asked) > NOTED * asked:
            reason = "no channel was left to remove"
            if round_to is not None and round_to > 1:
                reason = f"widths are multiples of {round_to}"
            elif state.dense is None:
                reason = "the run ended before a batch was seen"
            elif left > asked:
                reason = "every channel that is left is needed, or larger than what is missing"
        return Target(f"{self.what} left", asked, left, "share", reason)


def _warn_of_weak_steps(share: float) -> None:
    """Warn where steps in proportion to the weights (LAMB's) cannot hold what the lasso pulls.

    SGD's gradient grows as weights in front of a batch norm shrink, Adam's steps stay; these shrink with the
    weights. ``share``: what the lasso takes from the last norm to vanish, over what such a step can change.
    """
    if share > MOST_OF_STEPS:
        warnings.warn(
            "the steps of this optimizer are in proportion to the weights (LAMB, LARS, Adafactor): until the "
            f"target they move weights by {1 / share:.2g} times their size at the most, which is little "
            "beside a lasso that takes channels to zero in that time, so that accuracy may collapse: train "
            "longer, prune less, or use sgd or adamw",
            stacklevel=5,
        )


def _hold(state: TargetState, lasso: LassoState, view: ChannelTarget) -> None:
    """Leave out of the lasso what every layer keeps."""
    indices = held_indices(view, state.held)
    lasso.penalized = {
        name: without_channels(own, indices.get(name, {})) for name, own in (lasso.axes or {}).items()
    }


def steered_coefficient(
    target: ChannelTarget, state: TargetState, coefficient: float, epoch: int, last: int
) -> float:
    """The coefficient for an epoch that begins; resets the count of steps and chooses the held channels.

    ``coefficient`` is that of the epoch before; ``epoch`` epochs are finished, ``last`` when the target is to
    be met.
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
    """The share of the cost that should be left after an epoch."""
    first = BEGIN * last
    done = (epoch - first) / (last - first)
    return 1 - (1 - target) * min(max(done, 0.0), 1.0)


def held_indices(target: ChannelTarget, held: Mapping[str, Tensor]) -> dict[str, dict[int, list[int]]]:
    """Layer -> dimension -> indices of the channels that are held."""
    indices: dict[str, dict[int, list[int]]] = {}
    for group in target.groups:
        mask = held.get(group.name)
        if mask is None or len(mask) != group.size:
            continue
        for member in group.members:
            own = [i for channel in mask.nonzero().flatten().tolist() for i in member.indices[channel]]
            indices.setdefault(member.name.removesuffix(".weight"), {}).setdefault(member.dim, []).extend(own)
    return indices


Plan = Callable[[Mapping[str, Tensor], bool], SurgeryPlan]
"""(channels that stay, whether layers may be removed) -> the removal of what is zero."""


def plan_within(
    target: ChannelTarget, make: Plan, fallback: Plan, *, round_to: int, fill: bool
) -> SurgeryPlan:
    """The removal of channels that are zero, as far as the target allows; with ``fill`` as many as it takes.

    To fill, further channels are set to zero, the smallest norms first. ``fallback`` plans as ``make`` does
    where channels alone are cut, so that the cost is exactly as predicted.
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
    # More is zero than the target asks for: the largest zeros, and layers, stay.
    zero = target.removed_by(make(stays, False))
    order = [(norm, channel) for norm, channel in target.order(norms) if channel in zero]
    return fallback(target.staying(target.choose(order, round_to)), False)
