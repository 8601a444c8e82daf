"""Removing neurons in steps: silence more and more, then remove them all (When to Prune? Algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.graph.copying import working_copy
from clicktrain.graph.prunable import PrunableLayers
from clicktrain.methods.channels.budget import ChannelBudget
from clicktrain.methods.channels.criteria import ChannelScores, Gradient, NeuronCriterion
from clicktrain.methods.channels.selection import ChannelSelection, LatencyCalibration, Masks
from clicktrain.methods.contract import Action, Reconfigure, Record, SilenceChannels
from clicktrain.runs.events import PrunedEvent, ReconfiguredEvent
from clicktrain.sparsity.channel_importance import count_gone, prunable_channels
from clicktrain.surgery import SurgeryPlan, apply_surgery_, read_recipe
from clicktrain.surgery.neurons import count_pruned, masks_of_recipe, shuffled, widths


@dataclass(slots=True)
class StepwiseState:
    """Scores since the last pruning step, and the neurons that the steps have kept so far."""

    scores: ChannelScores = field(default_factory=ChannelScores)
    steps_done: int = 0
    kept: Masks = field(default_factory=dict)
    calibration: LatencyCalibration = field(default_factory=LatencyCalibration)
    selection: ChannelSelection | None = field(default=None, compare=False)
    plan: SurgeryPlan | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class StepwiseRemoval:
    """Neurons ranked by importance over the whole network are removed in ``steps`` steps.

    ``exclude`` names layers whose outputs all stay, by module path (shell-style).
    """

    budget: ChannelBudget
    criterion: NeuronCriterion
    steps: int = 1
    exclude: tuple[str, ...] = ()

    def selection(self, state: StepwiseState, prunable: PrunableLayers) -> ChannelSelection:
        """The neurons of the network, found at the first call; UserError if the budget cannot be met."""
        if state.selection is None:
            state.selection = ChannelSelection.of(prunable, self.budget, self.exclude, state.calibration)
        return state.selection

    def add_scores(self, state: StepwiseState, prunable: PrunableLayers, gradient: Gradient) -> None:
        """Score the neurons after a batch."""
        chosen = self.selection(state, prunable)
        state.scores.add(chosen.groups, self.criterion, chosen.parameters, gradient)

    def structure(self, state: StepwiseState, prunable: PrunableLayers) -> dict[str, int]:
        """Neurons of each group that would be kept if pruning took place now."""
        return widths(self.selection(state, prunable).choose(self._means(state, prunable), None, 1, 1))

    def advance(self, state: StepwiseState, prunable: PrunableLayers, step: int) -> list[Action]:
        """Take the steps that are due, up to ``step``, which is not the last; silence what they prune."""
        chosen = self.selection(state, prunable)
        actions: list[Action] = []
        if step > state.steps_done:
            state.kept = chosen.choose(self._means(state, prunable), state.kept or None, step, self.steps)
            state.plan = chosen.plan(state.kept)
            measured = chosen.measured(state.plan, state.kept) if chosen.measures_after(step) else {}
            state.steps_done, state.scores = step, ChannelScores()
            pruned = count_pruned(state.kept)
            event = PrunedEvent(pruning_step=step, neurons_pruned=pruned, neurons=chosen.total, **measured)
            actions.append(Record(event))
        if state.kept:
            state.plan = state.plan or chosen.plan(state.kept)
            actions.append(SilenceChannels(state.plan))
        return actions

    def remove(self, state: StepwiseState, prunable: PrunableLayers) -> Reconfigure:
        """The last step, and the physical removal of all pruned neurons."""
        chosen = self.selection(state, prunable)
        masks, plan, event = chosen.final(self._means(state, prunable), state.kept or None, self.steps)
        return _removal(chosen, masks, plan, event)

    def remove_as_in(
        self, state: StepwiseState, prunable: PrunableLayers, recipe: str, shuffle: int | None
    ) -> list[Reconfigure]:
        """Remove what another run removed, by its ``surgery.json``.

        Where that run removed layers or put gates in (PruneTrain), its plans are carried out one after the
        other. With a seed, ``shuffle``, as many neurons of each group are drawn instead.
        """
        plans = read_recipe(recipe)
        if changes_layers(plans):
            event = ReconfiguredEvent(structure_from=recipe)
            return [Reconfigure(plan, event) for plan in plans if plan]
        chosen = self.selection(state, prunable)
        masks = masks_of_recipe(chosen.groups, plans)
        masks = masks if shuffle is None else shuffled(masks, shuffle)
        return [_removal(chosen, masks, chosen.plan(masks), {"structure_from": recipe})]

    def _means(self, state: StepwiseState, prunable: PrunableLayers) -> dict[str, Tensor]:
        chosen = self.selection(state, prunable)
        return state.scores.means(chosen.groups, chosen.parameters)


def changes_layers(plans: Sequence[SurgeryPlan]) -> bool:
    """Whether plans do more than remove neurons: layers that go, gates that come."""
    return any(plan.removed_layers or plan.gates for plan in plans)


def check_structure(recipe: str, shuffle: int | None, model: nn.Module | None) -> None:
    """Look at the ``surgery.json`` of another run before this one begins.

    Raises:
        UserError: there is no such file, its layers are not those of this network, or neurons are to be drawn
            in a structure that has lost layers or has gates.
    """
    plans = read_recipe(recipe)
    if not changes_layers(plans) or model is None:
        return
    if shuffle is not None:
        raise UserError(
            "structure_shuffle draws other neurons in each layer, but the structure has removed layers or "
            "gates, which say what neurons are connected: leave structure_shuffle out"
        )
    trial = working_copy(model)
    for plan in plans:
        apply_surgery_(plan, trial)


def _removal(
    chosen: ChannelSelection, masks: Masks, plan: SurgeryPlan, event: Mapping[str, Any]
) -> Reconfigure:
    filters, counted = chosen.filters, chosen.weights
    if chosen.budget.round_to != 1:
        event = {**event, "round_to": chosen.budget.round_to}
    done = ReconfiguredEvent(
        neurons=chosen.total,
        neurons_pruned=count_pruned(masks),
        filters=prunable_channels(chosen.sizes, 0, filters),
        filters_pruned=count_gone(masks, filters),
        prune_ratio=count_gone(masks, counted) / chosen.counted,
        structure=widths(masks),
        **event,
    )
    return Reconfigure(plan, done)
