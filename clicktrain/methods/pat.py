"""PaT, pruning-aware training: neurons are removed once it is stable which ones (When to Prune?, section 3).

Stages: dense training, with the early pruning indicator taken at the end of every epoch; one epoch in which
neurons are pruned step by step (Algorithm 1) and at whose end they are removed; sparse training, of the
smaller network. Other rules for when to begin, and the paper's baselines, are settings of the same method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayers, find_prunable
from clicktrain.methods.base import (
    Action,
    LayerPlan,
    Method,
    PruningPlan,
    Reconfigure,
    Record,
    RestoreTensors,
    RunLength,
    SilenceChannels,
    StepInfo,
    plan_rows,
)
from clicktrain.methods.channels.selection import Amount, ChannelSelection, LatencyCourse
from clicktrain.methods.outcome import NOTED, Reached, Target, latency_target
from clicktrain.methods.triggers import StartRule, StructureWatch, default_threshold, default_window
from clicktrain.sparsity.channel_importance import add_scores_
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.triggers import PolicyChoice
from clicktrain.surgery import SurgeryPlan, read_recipe
from clicktrain.surgery.neurons import (
    NEURON_CRITERIA,
    NeuronCriterionChoice,
    NeuronValues,
    magnitude_of_neurons,
    masks_of_recipe,
    shuffled,
    widths,
)

STAGES = ("dense", "prune", "sparse")


@dataclass(slots=True)
class PaTState:
    """What PaT remembers between steps. ``selection`` and ``plan`` follow from the rest and are not saved."""

    stage: str = "dense"
    entered: int = 0
    """Epoch (from 0) in which pruning takes place."""
    reason: str = ""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Per group, scores added up since the last decision."""
    counts: dict[str, int] = field(default_factory=dict)
    """Batches in these sums."""
    watch: StructureWatch = field(default_factory=StructureWatch)
    steps_done: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)
    initial: dict[str, Tensor] = field(default_factory=dict)
    """Tensors before the first step, for ``rewind``."""
    course: LatencyCourse = field(default_factory=LatencyCourse)
    selection: ChannelSelection | None = field(default=None, compare=False)
    plan: SurgeryPlan | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class PaT(Method[PaTState]):
    """Neurons ranked over the whole network are removed early, when EPI says so (When to Prune?, 2022).

    A neuron is an output channel; those of a residual stage that can only go together are one neuron.
    """

    name: ClassVar[str] = "pat"
    title: ClassVar[str] = "PaT"
    reads_graph: ClassVar[bool] = True

    prune_ratio: float = 0.3
    """Share of all neurons that is removed; not used if a latency is given."""
    criterion: NeuronCriterionChoice = "taylor"
    """Importance of a neuron: taylor (the change of the loss by batch norm's scale and shift, by the weights
    where there is no batch norm), taylor_weights (Eq. 3 on the weights everywhere; about zero in front of a
    batch norm), magnitude (Eq. 2); any other criterion of weights is summed over a neuron's."""
    policy: PolicyChoice = "epi"
    """When: epi (the structure is stable), loss_slope (the loss settles, ClickTrain's rule), epoch (at
    prune_epoch), random (an epoch drawn up to latest_start), or init (before training: structural SNIP with 1
    of prune_steps, FORCE with more)."""
    prune_epoch: int | None = None
    """Epoch, from 0, in which neurons are pruned (policy epoch; 0 with initial_weights: pruning after
    training, then fine-tuning)."""
    policy_seed: int = 0
    """Draws the epoch of policy random."""
    epi_window: int | None = None
    """Past epochs r that a structure is compared with; a third of the longest dense training by default, 5 at
    the most."""
    epi_threshold: float | None = None
    """EPI from which a structure is stable; 0.944 for gradients, 0.983 for magnitudes by default."""
    loss_slope: float = 0.27
    """Pruning starts when the training loss falls by less than this between epochs (policy loss_slope)."""
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
    """Remove the neurons that another run removed: its surgery.json. With policy epoch and prune_epoch 0
    before the first step, i.e. the lottery ticket trained from its initial weights."""
    structure_shuffle: int | None = None
    """Seed that draws other neurons than those of structure_from, as many in each layer."""
    min_channels: int = 1
    """Neurons that every layer keeps."""
    round_to: int = 1
    """Widths become the nearest multiples of it; the pruned share is then no longer exact."""
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
        if not 0 < self.prune_ratio < 1:
            raise UserError(f"prune_ratio must be between 0 and 1 (0.3 keeps 70%), not {self.prune_ratio}")
        for key in ("epi_window", "prune_steps", "init_batches", "min_channels", "round_to", "latency_batch"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key} must be at least 1, not {value}")
        for key in ("epi_threshold", "latest_start"):
            value = getattr(self, key)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{key} must be between 0 and 1, not {value}")
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
        self._check_latency()

    def _check_latency(self) -> None:
        if self.latency_target is not None and self.latency_target_ms is not None:
            raise UserError("latency_target and latency_target_ms are both set: give one")
        if self.latency_target is not None and not 0 < self.latency_target < 1:
            raise UserError(
                f"latency_target is a share of the whole network's time, between 0 and 1, not "
                f"{self.latency_target}; milliseconds are latency_target_ms"
            )
        if self.latency_target_ms is not None and not 0 < self.latency_target_ms < math.inf:
            raise UserError(f"latency_target_ms must be above 0, not {self.latency_target_ms}")
        targets = (self.latency_target, self.latency_target_ms, self.latency_penalty)
        if self.latency_batch != 1 and targets == (None, None, None):
            raise UserError(
                f"latency_batch is {self.latency_batch} but no latency counts: give latency_target or "
                "latency_penalty too"
            )
        if self.latency_penalty is not None and not 0 <= self.latency_penalty < math.inf:
            raise UserError(f"latency_penalty must not be negative, not {self.latency_penalty}")

    # ---- what -------------------------------------------------------------------------------

    @property
    def amount(self) -> Amount:
        """How much is to go."""
        by_latency = self.latency_target is not None or self.latency_target_ms is not None
        penalty = float(by_latency) if self.latency_penalty is None else self.latency_penalty
        return Amount(
            self.prune_ratio, self.latency_target, self.latency_target_ms, self.latency_batch, penalty,
            self.min_channels, self.round_to,
        )  # fmt: skip

    @property
    def threshold(self) -> float:
        """EPI from which a structure is stable (section 4.2)."""
        if self.epi_threshold is not None:
            return self.epi_threshold
        return default_threshold(self.criterion, NEURON_CRITERIA)

    def find_prunable(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> PrunableLayers:
        """Every convolution, the first and depthwise ones too, and fully connected layers."""
        return find_prunable(model, trained, include=("*",), linear=True)

    def _selection(self, state: PaTState, prunable: PrunableLayers) -> ChannelSelection:
        if state.selection is None:
            state.selection = ChannelSelection.of(prunable, self.amount, self.exclude, state.course)
        return state.selection

    # ---- when -------------------------------------------------------------------------------

    def start(self, length: RunLength) -> StartRule:
        """In which epoch neurons are pruned."""
        latest = min(length.epochs - 1, round(self.latest_start * length.epochs))
        window = self.epi_window or default_window(latest)
        return StartRule(self.policy, latest, window, self.threshold, self.prune_epoch, self.policy_seed,
                         self.loss_slope)  # fmt: skip

    # ---- life cycle -------------------------------------------------------------------------

    def init(self, prunable: PrunableLayers, length: RunLength) -> PaTState:
        """Check that the run can be done as asked."""
        if self.prune_epoch is not None and self.prune_epoch >= length.epochs:
            raise UserError(
                f"prune_epoch is {self.prune_epoch} but the last of {length.epochs} epochs is "
                f"{length.epochs - 1}: begin earlier"
            )
        if self.structure_from is not None:
            read_recipe(self.structure_from)
        NEURON_CRITERIA.resolve(self.criterion)
        state = PaTState()
        if prunable.example is not None:
            self._selection(state, prunable)
        if self.rewind and prunable.model is not None:
            tensors = {**dict(prunable.model.named_parameters()), **dict(prunable.model.named_buffers())}
            state.initial = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        if (reason := self.start(length).due(0, state.watch, ())) is not None:
            state.stage, state.reason = "prune", reason
        return state

    def stage(self, state: PaTState) -> str:
        """dense, prune or sparse (Algorithm 2)."""
        return state.stage

    def _holds_weights(self, state: PaTState) -> bool:
        """Whether the optimizer's steps are to change nothing: what is before training is before it."""
        at_first = self.structure_from is not None and state.entered == 0
        return state.stage == "prune" and (self.policy == "init" or at_first)

    def before_step(self, state: PaTState, prunable: PrunableLayers, step: StepInfo) -> None:
        """Add up scores; before training, take the gradients away so that no weight moves."""
        if state.stage == "sparse" or prunable.model is None or prunable.example is None:
            return
        selection = self._selection(state, prunable)
        criterion = NEURON_CRITERIA.resolve(self.criterion)
        for group in selection.groups:
            scores = criterion(NeuronValues(group, selection.parameters, step.gradient))
            if scores is not None:
                add_scores_(state.sums, {group.name: scores})
                state.counts[group.name] = state.counts.get(group.name, 0) + 1
        if self._holds_weights(state):
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
        epoch = math.floor(step.position)
        actions: list[Action] = [self._indicator(state, prunable, step.length)]
        reason = self.start(step.length).due(epoch, state.watch, step.epoch_losses)
        state.sums, state.counts = {}, {}
        if reason is not None and epoch < step.length.epochs:
            state.stage, state.entered, state.reason = "prune", epoch, reason
            actions += self._announce(state)
            if self.structure_from is not None:
                actions += self._remove(state, prunable)
        return actions

    def _announce(self, state: PaTState) -> list[Action]:
        trigger = {"event": "trigger", "policy": choice_name(self.policy), "reason": state.reason,
                   "epi": state.watch.epi, "threshold": self.threshold,
                   "prune_epoch": state.entered}  # fmt: skip
        return [Record(trigger), Record(_stage_event("prune", state.reason))]

    def _mean_scores(self, state: PaTState, prunable: PrunableLayers) -> dict[str, Tensor]:
        """Per group, averaged over batches; magnitudes if no batch was seen, 0 without any gradient."""
        selection = self._selection(state, prunable)
        if not state.sums:
            return {
                group.name: magnitude_of_neurons(NeuronValues(group, selection.parameters, lambda _: None))
                for group in selection.groups
            }
        return {
            group.name: state.sums[group.name] / state.counts[group.name]
            if group.name in state.sums
            else torch.zeros(group.size)
            for group in selection.groups
        }

    def _indicator(self, state: PaTState, prunable: PrunableLayers, length: RunLength) -> Action:
        """Algorithm 2, lines 6 to 8: the structure of the best neurons, and EPI."""
        selection = self._selection(state, prunable)
        structure = widths(selection.choose(self._mean_scores(state, prunable), None, 1, 1))
        return state.watch.add(
            structure, self.start(length).window, self.threshold, choice_name(self.criterion)
        )

    # ---- the pruning epoch ------------------------------------------------------------------

    def _prune(self, state: PaTState, prunable: PrunableLayers, step: StepInfo) -> list[Action]:
        """Algorithm 1."""
        first = step.seen == step.batches  # what began before training could not be told then
        actions = self._announce(state) if first else []
        if self.structure_from is not None:
            return [*actions, *self._remove(state, prunable)]
        done = step.position - state.entered
        if self.policy == "init":
            done = step.seen / min(self.init_batches, step.length.steps_per_epoch)
        due = min(self.prune_steps, math.floor(done * self.prune_steps + 1e-9))
        if due == self.prune_steps:
            return [*actions, *self._remove(state, prunable)]
        selection = self._selection(state, prunable)
        if due > state.steps_done:
            scores = self._mean_scores(state, prunable)
            state.kept = selection.choose(scores, state.kept or None, due, self.prune_steps)
            state.plan = selection.plan(state.kept)
            measured = selection.measured(state.plan, state.kept) if selection.measures_after(due) else {}
            state.steps_done, state.sums, state.counts = due, {}, {}
            pruned = selection.total - sum(widths(state.kept).values())
            event = {"event": "pruned", "pruning_step": due, "neurons_pruned": pruned,
                     "neurons": selection.total, **measured}  # fmt: skip
            actions.append(Record(event))
        if state.kept:
            state.plan = state.plan or selection.plan(state.kept)
            actions.append(SilenceChannels(state.plan))
        return actions

    def _remove(self, state: PaTState, prunable: PrunableLayers) -> list[Action]:
        """The last pruning step, and the physical removal of all that was pruned."""
        selection = self._selection(state, prunable)
        about: dict[str, Any]
        if self.structure_from is not None:
            masks = masks_of_recipe(selection.groups, read_recipe(self.structure_from))
            if self.structure_shuffle is not None:
                masks = shuffled(masks, self.structure_shuffle)
            plan, about = selection.plan(masks), {"structure_from": self.structure_from}
        else:
            scores = self._mean_scores(state, prunable)
            masks, plan, about = selection.final(scores, state.kept or None, self.prune_steps)
        state.stage = "sparse"
        pruned = selection.total - sum(widths(masks).values())
        event = {
            "neurons": selection.total,
            "neurons_pruned": pruned,
            "prune_ratio": pruned / selection.total,
            "structure": widths(masks),
            **about,
        }
        restored: list[Action] = [RestoreTensors(dict(state.initial))] if state.initial else []
        self._forget(state)
        stage = Record(_stage_event("sparse", "neurons are removed"))
        return [*restored, Reconfigure(plan, event), stage]

    @staticmethod
    def _forget(state: PaTState) -> None:
        """What served the decision."""
        state.sums, state.counts, state.kept, state.initial = {}, {}, {}, {}
        state.selection = state.plan = None
        state.watch = StructureWatch()

    def at_end(self, state: PaTState, prunable: PrunableLayers) -> Sequence[Action]:
        """A run always ends pruned."""
        if state.stage == "sparse" or prunable.example is None:
            return ()
        return self._remove(state, prunable)

    def targets_of(self, state: PaTState, reached: Reached) -> Sequence[Target]:
        """The share of neurons, or the time; the structure of another run is none of its own."""
        del state
        if self.structure_from is not None:
            return ()
        event = reached.last_event("reconfigured", "neurons")
        if self.amount.by_latency:
            return [latency_target(event, self.latency_target, self.latency_target_ms)]
        removed = float(event.get("prune_ratio", 0.0))
        reason = "" if event else "the run ended before a batch was seen"
        if event and abs(removed - self.prune_ratio) > NOTED * self.prune_ratio:
            reason = f"there are {event['neurons']} neurons"
            if self.round_to > 1:
                reason += f", and widths are multiples of {self.round_to}"
        return [Target("neurons removed", self.prune_ratio, removed, "share", reason)]

    # ---- what is shown and saved ------------------------------------------------------------

    def plan(self, prunable: PrunableLayers, length: RunLength, state: PaTState | None = None) -> PruningPlan:
        """Per layer: how many neurons compete, and with which layers they can only go together."""
        over = state is not None and state.stage == "sparse"
        notes, summary = {}, "neurons were removed" if over else "neurons are known after the first batch"
        if prunable.example is not None and not over:
            selection = ChannelSelection.of(prunable, self.amount, self.exclude)
            notes = selection.describe()
            asked = f"{selection.num_pruned} are removed, wherever they are"
            if self.latency_target_ms is not None:
                asked = f"as many are removed as it takes to be at {self.latency_target_ms:g} ms"
            elif self.latency_target is not None:
                asked = f"as many are removed as it takes to be at {self.latency_target:.0%} of the time"
            summary = f"{selection.total} neurons: {asked}"
        rows = []
        for layer in prunable.layers:
            compete = layer.name in notes
            why = notes.get(layer.name, "the neurons that are left" if over else "its outputs stay")
            what, density = ("neurons", None) if compete else ("none", 1.0)
            rows.append(LayerPlan(layer.name, layer.shape, what, density, None, why))
        return PruningPlan(plan_rows(prunable, rows), summary, self._stage_lines(length))

    def _stage_lines(self, length: RunLength) -> tuple[tuple[str, str], ...]:
        how = "one epoch" if self.policy != "init" else "before training"
        return (
            ("stage 1 dense", self.start(length).describe()),
            (
                "stage 2 prune",
                f"{how}, {self.prune_steps} steps by {choice_name(self.criterion)}, then removal",
            ),
            ("stage 3 sparse", "to the end, with the neurons that are left"),
        )

    def state_dict(self, state: PaTState) -> dict[str, Any]:
        """Nested dicts of tensors, numbers and strings."""
        return {
            "stage": state.stage,
            "entered": state.entered,
            "reason": state.reason,
            "sums": dict(state.sums),
            "counts": dict(state.counts),
            "watch": state.watch.state_dict(),
            "steps_done": state.steps_done,
            "kept": dict(state.kept),
            "initial": dict(state.initial),
            "course": {"dense_ms": state.course.dense_ms, "correction": state.course.correction},
        }

    def load_state(self, prunable: PrunableLayers, length: RunLength, saved: Mapping[str, Any]) -> PaTState:
        """Inverse of `state_dict`."""
        del length
        weight = next((layer.weight for layer in prunable.layers), None)
        device = None if weight is None else weight.device
        return PaTState(
            stage=saved["stage"],
            entered=saved["entered"],
            reason=saved["reason"],
            sums={name: value.to(device, copy=True) for name, value in saved["sums"].items()},
            counts=dict(saved["counts"]),
            watch=StructureWatch.from_state(saved["watch"]),
            steps_done=saved["steps_done"],
            kept={name: mask.cpu() for name, mask in saved["kept"].items()},
            initial={name: value.to(device, copy=True) for name, value in saved["initial"].items()},
            course=LatencyCourse(**saved["course"]),
        )


def _stage_event(stage: str, reason: str) -> dict[str, Any]:
    return {"event": "stage", "stage": stage, "number": STAGES.index(stage) + 1, "reason": reason}
