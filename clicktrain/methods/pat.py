"""PaT, pruning-aware training: prune neurons as soon as it is stable which ones (When to Prune?, section 3).

Stages: dense training, with the early pruning indicator measured at the end of every epoch; one epoch in
which neurons are pruned step by step (Algorithm 1) and at whose end they are removed; sparse training of the
smaller network. Other triggers, and the paper's baselines, are settings of the same method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayers, find_prunable
from clicktrain.methods.base import (
    Action,
    LayerPlan,
    Method,
    PruningPlan,
    Record,
    RestoreTensors,
    RunLength,
    StepInfo,
    plan_rows,
)
from clicktrain.methods.channels.budget import ChannelBudget
from clicktrain.methods.channels.criteria import NEURON_CRITERIA, ChannelScores, NeuronCriterionChoice
from clicktrain.methods.channels.selection import ChannelSelection
from clicktrain.methods.channels.stepwise import StepwiseRemoval, StepwiseState, check_structure
from clicktrain.methods.outcome import Reached, Target
from clicktrain.methods.saved_state import restored_state
from clicktrain.methods.triggers import LossSlopeSettings, StartRule, StructureSettings, StructureWatch
from clicktrain.runs.events import StageEvent, TriggerEvent
from clicktrain.settings import part_of
from clicktrain.sparsity.channel_importance import prunable_channels
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.triggers import PolicyChoice

STAGES = ("dense", "prune", "sparse")


@dataclass(slots=True)
class PaTState:
    """State of PaT between steps."""

    stage: str = "dense"
    entered: int = 0
    """Epoch (from 0) in which pruning takes place."""
    reason: str = ""
    watch: StructureWatch = field(default_factory=StructureWatch)
    pruning: StepwiseState = field(default_factory=StepwiseState)
    initial: dict[str, Tensor] = field(default_factory=dict)
    """Tensors before the first step, for ``rewind``."""


@dataclass(frozen=True, kw_only=True)
class PaT(StructureSettings, LossSlopeSettings, Method[PaTState]):
    """Remove channels once their ranking is stable (When to Prune?, 2022).

    A neuron is an output channel; channels of a residual stage that can only be removed together are one.
    """

    name: ClassVar[str] = "pat"
    title: ClassVar[str] = "PaT"
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("prune_ratio", "latency_target", "latency_target_ms"),
    )
    freezes: ClassVar[bool] = False
    reads_graph: ClassVar[bool] = True

    prune_ratio: float = 0.3
    """Share of all filters to remove, the paper's alpha; not used if a latency is given."""
    prune_ratio_of: Literal["filters", "neurons"] = "filters"
    """What the ratio counts: filters, at least as many as asked and less than one neuron more; or neurons,
    filters that can only be removed together as one."""
    criterion: NeuronCriterionChoice = "taylor"
    """Importance of a neuron: taylor (the change of the loss by batch norm's scale and shift, by the weights
    where there is no batch norm), taylor_weights (Eq. 3 on the weights everywhere; about zero in front of a
    batch norm), magnitude (Eq. 2), or any criterion of weights, summed over the neuron."""
    policy: PolicyChoice = "epi"
    """When: epi (the structure is stable), loss_slope (the loss settles, ClickTrain's rule), epoch (at
    prune_epoch), random (an epoch drawn up to latest_start), or init (before training: structural SNIP with 1
    of prune_steps, FORCE with more)."""
    prune_epoch: int | None = None
    """Epoch, from 0, in which neurons are pruned (policy epoch; 0 with initial_weights: pruning after
    training, then fine-tuning)."""
    policy_seed: int = 0
    """Draws the epoch of policy random."""
    latest_start: float = 0.34
    """Pruning starts at this share of the run at the latest (policies epi, loss_slope, random): section 4.2
    finds epoch 30 of 90 the last that costs no accuracy."""
    prune_steps: int = 10
    """Pruning steps S within the epoch, on an exponential schedule."""
    init_batches: int = 100
    """Batches on which policy init scores neurons, weights held still; an epoch at the most."""
    rewind: bool = False
    """Give the remaining neurons their initial weights back when the others are removed (lottery ticket)."""
    structure_from: str | None = None
    """Remove what another run removed, of this method or of PruneTrain, layers included: its surgery.json.
    With policy epoch and prune_epoch 0 before the first step, i.e. the final structure trained from scratch,
    with the seed of that run from its own initial weights (lottery ticket)."""
    structure_shuffle: int | None = None
    """Seed that draws other neurons than those of structure_from, as many in each layer."""
    min_channels: int = 1
    """Neurons that every layer keeps."""
    round_to: int | Literal["device"] = "device"
    """Widths become the nearest multiples of it; the pruned share is then no longer exact. device: 8 on GPUs,
    whose tensor cores take these without padding, 1 elsewhere."""
    latency_target: float | None = None
    """Inference time to end at, as a share of the whole network's, instead of a pruning ratio."""
    latency_target_ms: float | None = None
    """Inference time to end at, in milliseconds per batch, instead of a pruning ratio."""
    latency_batch: int = 1
    """Images of the batch whose time counts."""
    latency_penalty: float | None = None
    """Importance is divided by the time that a removal saves, to this power; 1 with a latency target, else
    0, by default."""
    exclude: tuple[str, ...] = ()
    """Layers whose outputs all stay, by module path (shell-style)."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        self.check_structure()
        self.check_loss_slope()
        for key in ("prune_steps", "init_batches"):
            if getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 1, not {getattr(self, key)}")
        if not 0 <= self.latest_start <= 1:
            raise UserError(f"latest_start must be between 0 and 1, not {self.latest_start}")
        if (self.policy == "epoch") != (self.prune_epoch is not None):
            raise UserError("prune_epoch goes with policy epoch, and policy epoch needs one: set both")
        if self.prune_epoch is not None and self.prune_epoch < 0:
            raise UserError(f"prune_epoch must not be negative, not {self.prune_epoch}")
        if self.structure_shuffle is not None and self.structure_from is None:
            raise UserError("structure_shuffle needs a structure_from: the surgery.json of another run")
        if self.structure_from is not None and self.policy == "init":
            raise UserError(
                "structure_from needs no scores: use policy epoch with prune_epoch 0 instead of init"
            )
        _ = self.budget

    # ---- the parts --------------------------------------------------------------------------

    @property
    def budget(self) -> ChannelBudget:
        """How many neurons are removed."""
        return part_of(ChannelBudget, self)

    @property
    def removal(self) -> StepwiseRemoval:
        """Which neurons are removed, and in how many steps."""
        criterion = NEURON_CRITERIA.resolve(self.criterion)
        return StepwiseRemoval(self.budget, criterion, self.prune_steps, self.exclude)

    @property
    def threshold(self) -> float:
        """EPI from which a structure is stable (section 4.2)."""
        return self.tau(self.criterion, NEURON_CRITERIA)

    def start(self, length: RunLength) -> StartRule:
        """In which epoch neurons are pruned."""
        latest = min(length.epochs - 1, round(self.latest_start * length.epochs))
        return StartRule(
            policy=self.policy,
            latest=latest,
            window=self.window(latest),
            compared=self.history(latest),
            threshold=self.threshold,
            prune_epoch=self.prune_epoch,
            seed=self.policy_seed,
            slope=self.settled,
            batches=length.steps_per_epoch,
        )

    def find_prunable(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> PrunableLayers:
        """Every convolution, the first and depthwise ones too, and linear layers."""
        return find_prunable(model, trained, include=("*",), linear=True)

    # ---- life cycle -------------------------------------------------------------------------

    def init(self, prunable: PrunableLayers, length: RunLength) -> PaTState:
        """Check that the run can be done as asked."""
        if self.prune_epoch is not None and self.prune_epoch >= length.epochs:
            raise UserError(
                f"prune_epoch is {self.prune_epoch} but the last of {length.epochs} epochs is "
                f"{length.epochs - 1}: begin earlier"
            )
        if self.structure_from is not None:
            check_structure(self.structure_from, self.structure_shuffle, prunable.model)
        if self.policy == "epi":
            self.warn_of_short_run(self.start(length).latest, f"latest_start {self.latest_start:g}")
        removal, state = self.removal, PaTState()
        if prunable.example is not None:
            removal.selection(state.pruning, prunable)
        if self.rewind and prunable.model is not None:
            tensors = {**dict(prunable.model.named_parameters()), **dict(prunable.model.named_buffers())}
            state.initial = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        if (reason := self.start(length).due(0, state.watch, ())) is not None:
            state.stage, state.reason = "prune", reason
        return state

    def before_step(self, state: PaTState, prunable: PrunableLayers, step: StepInfo) -> None:
        """Add up scores; before training, take the gradients away so that no weight moves."""
        if state.stage == "sparse" or prunable.model is None or prunable.example is None:
            return
        self.removal.add_scores(state.pruning, prunable, step.gradient)
        at_first = self.structure_from is not None and state.entered == 0
        if state.stage == "prune" and (self.policy == "init" or at_first):
            for parameter in prunable.model.parameters():
                parameter.grad = None

    def after_step(self, state: PaTState, prunable: PrunableLayers, step: StepInfo) -> Sequence[Action]:
        """At the end of an epoch: is the structure stable? In the pruning epoch: the next step, if due."""
        if state.stage == "sparse" or prunable.example is None:
            return ()
        if state.stage == "prune":
            return self._prune(state, prunable, step)
        if not step.ends_epoch:
            return ()
        epoch, start = math.floor(step.position), self.start(step.length)
        structure = self.removal.structure(state.pruning, prunable)
        actions: list[Action] = [
            state.watch.add(structure, start.window, self.threshold, choice_name(self.criterion))
        ]
        state.pruning.scores = ChannelScores()
        reason = start.due(epoch, state.watch, step.epoch_losses)
        if reason is not None and epoch < step.length.epochs:
            state.stage, state.entered, state.reason = "prune", epoch, reason
            actions += self._announce(state)
            if self.structure_from is not None:
                actions += self._remove(state, prunable)
        return actions

    def _announce(self, state: PaTState) -> list[Action]:
        trigger = TriggerEvent(
            policy=choice_name(self.policy),
            reason=state.reason,
            epi=state.watch.epi,
            threshold=self.threshold,
            prune_epoch=state.entered,
        )
        return [Record(trigger), _enters("prune", state.reason)]

    def _prune(self, state: PaTState, prunable: PrunableLayers, step: StepInfo) -> list[Action]:
        """The pruning epoch: Algorithm 1."""
        first = step.seen == step.batches  # nothing can be recorded before the first step
        actions = self._announce(state) if first else []
        done = step.position - state.entered
        if self.policy == "init":
            done = step.seen / min(self.init_batches, step.length.steps_per_epoch)
        due = min(self.prune_steps, math.floor(done * self.prune_steps + 1e-9))
        if due == self.prune_steps or self.structure_from is not None:
            return [*actions, *self._remove(state, prunable)]
        return [*actions, *self.removal.advance(state.pruning, prunable, due)]

    def _remove(self, state: PaTState, prunable: PrunableLayers) -> list[Action]:
        """The last pruning step; what served the decision is released."""
        if self.structure_from is None:
            removals = [self.removal.remove(state.pruning, prunable)]
        else:
            recipe, shuffle = self.structure_from, self.structure_shuffle
            removals = self.removal.remove_as_in(state.pruning, prunable, recipe, shuffle)
        restored: list[Action] = [RestoreTensors(state.initial)] if state.initial else []
        state.stage, state.initial = "sparse", {}
        state.pruning, state.watch = StepwiseState(), StructureWatch()
        return [*restored, *removals, _enters("sparse", "neurons are removed")]

    def at_end(self, state: PaTState, prunable: PrunableLayers) -> Sequence[Action]:
        """A run always ends pruned."""
        done = state.stage == "sparse" or prunable.example is None
        return () if done else self._remove(state, prunable)

    def targets_of(self, state: PaTState, reached: Reached) -> Sequence[Target]:
        """The share of neurons, or the time; none for the structure of another run."""
        del state
        return () if self.structure_from is not None else (self.budget.target(reached),)

    # ---- what is shown and saved ------------------------------------------------------------

    def plan(self, prunable: PrunableLayers, length: RunLength, state: PaTState | None = None) -> PruningPlan:
        """Per layer: how many neurons compete, and the layers that share them."""
        over = state is not None and state.stage == "sparse"
        notes, summary = {}, "neurons were removed" if over else "neurons are known after the first batch"
        if prunable.example is not None and not over:
            selection = ChannelSelection.of(prunable, self.budget, self.exclude)
            notes = selection.describe()
            filters = prunable_channels(selection.sizes, 0, selection.filters)
            summary = (
                f"{selection.total} neurons, {filters} filters: {self.budget.describe(selection.num_pruned)}"
            )
        rows = []
        for layer in prunable.layers:
            why = notes.get(layer.name, "the neurons that are left" if over else "its outputs stay")
            what, density = "neurons" if layer.name in notes else "none", 1.0 if over else None
            rows.append(LayerPlan(layer.name, layer.shape, what, density, None, why))
        how = "one epoch" if self.policy != "init" else "before training"
        stages = (
            ("stage 1 dense", self.start(length).describe()),
            (
                "stage 2 prune",
                f"{how}, {self.prune_steps} steps by {choice_name(self.criterion)}, then removal",
            ),
            ("stage 3 sparse", "to the end, with the neurons that are left"),
        )
        return PruningPlan(plan_rows(prunable, rows), summary, stages)

    def load_state(self, prunable: PrunableLayers, length: RunLength, saved: Mapping[str, Any]) -> PaTState:
        """The inverse of `state_dict`."""
        del prunable, length
        return restored_state(PaTState, saved)


def _enters(stage: str, reason: str) -> Record:
    return Record(StageEvent(stage=stage, number=STAGES.index(stage) + 1, reason=reason))
