"""ClickTrain: patterns and kernels chosen while training, then frozen masks (sections 4.1 to 4.4).

Stages: 1 dense training until the loss settles; 2 dynamic pattern pool; 3 adaptive finalization of patterns
and kernels; 4 regularization of the weights to be pruned; hard prune; 5 training on with frozen masks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayers, check_convolutions, find_prunable, matches
from clicktrain.latency.network_times import MeasureMasks
from clicktrain.latency.sparse_latency import SparseLatency
from clicktrain.methods.base import Action, Method, PruningPlan, Record, RunLength, StepInfo, hard_prune
from clicktrain.methods.outcome import NOTED, Reached, Target, latency_target
from clicktrain.methods.patterns.axes import ALLOCATIONS, PENALTIES, allocation_gains
from clicktrain.methods.patterns.plan import clicktrain_plan
from clicktrain.methods.patterns.selection import PatternLayer, Selection
from clicktrain.methods.patterns.settings import PatternSettings, stage_end
from clicktrain.methods.patterns.voting import close_pools, fill_in, read_batch
from clicktrain.methods.saved_state import restored_state
from clicktrain.methods.triggers import KernelWatch
from clicktrain.runs.events import FinalizedEvent, StageEvent
from clicktrain.sparsity.allocation import allocate, check_reachable
from clicktrain.sparsity.finalize import batch_counts
from clicktrain.sparsity.importance import CRITERIA
from clicktrain.sparsity.patterns import fixed_pool

STAGES = ("dense", "pool", "finalize", "regularize", "accelerated")


@dataclass(slots=True)
class ClickTrainState:
    """What changes during a run. Fields that are not compared are derived or measured, and not saved."""

    stage: str = "dense"
    entered: int = 0
    """Batches seen when the stage was entered."""
    counted: int = 0
    """Optimizer steps that this stage has used."""
    previous_loss: Tensor | None = None
    selection: Selection = field(default_factory=Selection)
    kernels: KernelWatch = field(default_factory=KernelWatch)
    """For trigger epi, in stage 1."""
    masks: dict[str, Tensor] = field(default_factory=dict, compare=False)
    """bool [F, C, R, S] per layer, from the end of stage 3 to the hard prune."""
    open_positions: dict[str, Tensor] = field(default_factory=dict, compare=False)
    """bool [F, C, R, S] per layer, within a step of stages 2 and 3: what the early penalty leaves alone."""
    layers: tuple[PatternLayer, ...] = field(default=(), compare=False)
    measure: MeasureMasks | None = field(default=None, compare=False)
    latency: SparseLatency | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class ClickTrain(PatternSettings, Method[ClickTrainState]):
    """Prune patterns and kernels, chosen while training (ClickTrain, 2021)."""

    name: ClassVar[str] = "clicktrain"
    title: ClassVar[str] = "ClickTrain"
    dense_until_chosen: ClassVar[bool] = True

    def find_prunable(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> PrunableLayers:
        """Convolutions that may be pruned; ``exclude``, ``include`` and ``layers`` must name some."""
        prunable = find_prunable(model, trained, exclude=self.exclude, include=self.include)
        for glob in self.layers:
            if not any(matches(layer.name, [glob]) for layer in prunable.convs):
                raise UserError(f"no layer that can be pruned is called {glob!r} (setting 'layers')")
        return prunable

    def init(self, prunable: PrunableLayers, length: RunLength) -> ClickTrainState:
        """Check that the run can be done as asked."""
        check_convolutions(prunable, "ClickTrain")
        CRITERIA.resolve(self.criterion or "")  # a user's own is imported now
        ALLOCATIONS.resolve(self.allocation or "")
        PENALTIES.resolve(self.penalty or "")
        lengths = self.schedule(length)
        if self.trigger == "epi":
            latest = lengths["latest"] // length.steps_per_epoch
            self.warn_of_short_run(latest, f"latest_start {self.latest_start:g}")
        state = ClickTrainState(layers=self.targets(prunable))
        if self.aim is None:
            budgets = [layer.budget for layer in state.layers]
            check_reachable(budgets, prunable.other_conv_weights, self.compression)
        return state

    def use_measure(
        self, state: ClickTrainState, prunable: PrunableLayers, measure: MeasureMasks | None
    ) -> None:
        """Measure what a latency as the target needs; a target out of reach is an error at once."""
        state.measure = measure
        if self.aim is not None and state.stage == "dense":
            self._latency(state, prunable)

    def _latency(self, state: ClickTrainState, prunable: PrunableLayers) -> SparseLatency:
        if state.latency is None:
            assert self.aim is not None
            state.latency = SparseLatency(
                prunable,
                [layer.budget for layer in state.layers],
                self.aim,
                patterns=self.patterns or 1,
                group=self.group if self.share == "kernels" else 1,
                measure=state.measure,
            )
        return state.latency

    def targets_of(self, state: ClickTrainState, reached: Reached) -> Sequence[Target]:
        """The compression of all convolution weights, or the time."""
        del state
        if self.aim is not None:
            event = reached.last_event("finalised", "predicted_ms")
            timed = {"inference": "inference time", "step": "time of a training step"}[self.latency_of]
            return [latency_target(event, self.latency_target, self.latency_target_ms, timed)]
        compression = reached.conv_weights_now / max(reached.conv_nonzero, 1)
        reason = "each filter of a layer keeps as many whole kernels"
        if self.layers:
            reason += ", and 'layers' fixes some"
        target = Target("compression of convolution weights", self.compression, compression, "times")
        return [replace(target, reason=reason if abs(compression / self.compression - 1) > NOTED else "")]

    # ---- steps ------------------------------------------------------------------------------

    def before_step(self, state: ClickTrainState, prunable: PrunableLayers, step: StepInfo) -> None:
        """Stages 2 and 3 read the gradients, they and stage 4 add the penalty's."""
        if state.stage in ("pool", "finalize"):
            self._read(state, step)
        elif state.stage == "regularize":
            self._penalize(state.layers, state.masks, step)
        elif state.stage == "dense" and self.watches_structure:
            state.kernels.see(prunable.convs, self.criterion or "taylor", step)

    def _penalize(self, layers: Sequence[PatternLayer], masks: Mapping[str, Tensor], step: StepInfo) -> None:
        """Add the gradient of the penalty on what masks prune, if the penalty has one."""
        if (add := PENALTIES.resolve(self.penalty or "none").gradient) is None:
            return
        coefficient = self.lasso if step.grad_scale is None else step.grad_scale * self.lasso
        for layer in layers:
            if (grad := layer.weight.grad) is not None and layer.name in masks:
                weight = layer.weight.detach()
                weight = weight if layer.is_view else layer.view(weight)
                layer.change_(add, grad, weight, masks[layer.name], coefficient)

    def _shrink(self, state: ClickTrainState, step: StepInfo, lengths: Mapping[str, int]) -> None:
        """Shrink the weights that masks prune, after the optimizer's step, if the penalty does that."""
        shrink = PENALTIES.resolve(self.penalty or "none").step
        masks = state.masks if state.stage == "regularize" else state.open_positions
        left = self._cut(state, lengths) - step.seen
        if shrink is None or left <= 0:
            return
        for layer in state.layers:
            if (mask := masks.get(layer.name)) is not None:
                change = shrink if layer.is_view else functools.partial(layer.change_, shrink)
                change(layer.weight, mask, math.ceil(left / step.batches))

    def _read(self, state: ClickTrainState, step: StepInfo) -> None:
        criterion = CRITERIA.resolve(self.criterion or "taylor")
        weight = batch_counts(state.previous_loss, step.loss, self.loss_margin, self.loss_margin_rule)
        proposes, votes = state.stage == "pool", self.selection == "votes"
        state.open_positions = read_batch(
            state.selection,
            state.layers,
            step,
            criterion,
            None if proposes else weight,
            votes,
            self.early_penalty or "none",
        )
        if state.open_positions:
            self._penalize(state.layers, state.open_positions, step)
        state.previous_loss = step.loss
        state.counted += 1

    def after_step(
        self, state: ClickTrainState, prunable: PrunableLayers, step: StepInfo
    ) -> Sequence[Action]:
        """Move on to the next stage when it is time."""
        lengths = self.schedule(step.length)
        if state.stage == "regularize" or state.open_positions:
            self._shrink(state, step, lengths)
            state.open_positions = {}
        actions: list[Action] = []
        if state.stage == "dense" and self.watches_structure and step.ends_epoch:
            actions.append(self._indicator(state, prunable, step.length))
        while (reason := self._due(state, step, lengths)) is not None:
            actions += self._advance(state, prunable, step.seen, reason)
        return actions

    def _due(self, state: ClickTrainState, step: StepInfo, lengths: Mapping[str, int]) -> str | None:
        """Why the current stage is over, or None. A stage that reads gradients has read at least one."""
        if state.stage == "accelerated":
            return None
        if state.stage == "dense":
            if step.seen >= lengths["latest"]:
                return f"{step.seen / step.length.total:.0%} of the run is over"
            if step.seen < lengths["earliest"]:
                return None
            trigger = "loss_slope" if self.trigger == "own" else self.trigger
            latest = lengths["latest"] // step.length.steps_per_epoch
            return state.kernels.fires(self, trigger, self.stable_from, latest, step)
        over = step.seen >= stage_end(state.stage, state.entered, lengths)
        reads = state.stage == "finalize" or (state.stage == "pool" and lengths["pool"] > 0)
        return "its length is over" if over and (state.counted > 0 or not reads) else None

    def cut_epoch(self, state: ClickTrainState, length: RunLength, *, latest: bool = False) -> float | None:
        """At the end of stage 4; without a time of its own not known while a trigger may begin stage 2."""
        if state.stage == "accelerated":
            return state.entered / length.steps_per_epoch
        lengths = self.schedule(length)
        known = latest or lengths["earliest"] == lengths["latest"] or "hard_prune" in lengths
        if state.stage == "dense" and not known:
            return None
        return self._cut(state, lengths) / length.steps_per_epoch

    def _cut(self, state: ClickTrainState, lengths: Mapping[str, int]) -> int:
        """Batches seen at the hard prune, if stage 2 has started or starts at its latest."""
        at = lengths["latest"] if state.stage == "dense" else state.entered
        for stage in STAGES[max(STAGES.index(state.stage), 1) : -1]:
            at = stage_end(stage, at, lengths)
        return at

    def _indicator(self, state: ClickTrainState, prunable: PrunableLayers, length: RunLength) -> Action:
        """EPI of the best kernels, as many as equal densities keep, whatever their layer."""
        if self.aim is None:
            budgets = [layer.budget for layer in state.layers]
            even = allocate(budgets, prunable.other_conv_weights, self.compression)
        else:
            even = self._latency(state, prunable).even()
        kept = sum(even[layer.name] * layer.shape[0] for layer in state.layers)
        share = kept / sum(layer.shape[0] * layer.shape[1] for layer in state.layers)
        return state.kernels.close_epoch(
            prunable.convs, share, self.epi_epochs(length), self.stable_from, self.criterion or "taylor"
        )

    # ---- ends of stages ---------------------------------------------------------------------

    def _advance(
        self, state: ClickTrainState, prunable: PrunableLayers, seen: int, reason: str
    ) -> list[Action]:
        """Close the current stage and enter the next."""
        self._fill_in(state)
        close = {"pool": self._close_pools, "finalize": self._finalize, "regularize": self._hard_prune}
        actions = close[state.stage](state, prunable) if state.stage in close else []
        state.kernels = KernelWatch()
        number = STAGES.index(state.stage) + 1
        state.stage, state.entered, state.counted = STAGES[number], seen, 0
        return [*actions, Record(StageEvent(stage=state.stage, number=number + 1, reason=reason))]

    def _fill_in(self, state: ClickTrainState) -> None:
        """Before a stage ends: layers without gradients so far take part by their magnitudes."""
        pool = state.stage == "pool" and self.pool == "dynamic"
        fill_in(
            state.selection, state.layers, self.selection == "votes", pool, finalize=state.stage == "finalize"
        )

    def _close_pools(self, state: ClickTrainState, prunable: PrunableLayers) -> list[Action]:
        del prunable
        fixed = fixed_pool(self.patterns or 0) if self.pool == "fixed" else None
        return [Record(close_pools(state.selection, state.layers, self.patterns or 0, fixed))]

    def _finalize(self, state: ClickTrainState, prunable: PrunableLayers) -> list[Action]:
        """Choose patterns and kernels: sections 4.1 and 4.3, with the budget allocated over layers."""
        layers, selection = state.layers, state.selection
        for layer in layers:
            selection.choose_patterns(layer, self.selection == "votes")
        scores = {layer.name: selection.scores(layer, self.kernel_score == "pattern") for layer in layers}
        kernels, about = self._kernels(state, prunable, scores)
        state.masks = selection.choose_masks(layers, scores, kernels)
        state.latency = None
        selection.forget_gradients()
        event = FinalizedEvent(
            compression_asked=self.compression_asked,
            compression_reached=_compression(prunable, state.masks),
            layers=[_decision(layer, kernels[layer.name], selection) for layer in layers],
            **about,
        )
        return [Record(event)]

    def _kernels(
        self, state: ClickTrainState, prunable: PrunableLayers, scores: Mapping[str, Tensor]
    ) -> tuple[dict[str, int], dict[str, Any]]:
        """Kept kernels per filter of every layer, and what to record about a latency."""
        layers, floor = state.layers, self.allocation_floor
        allocation = ALLOCATIONS.resolve(self.allocation or "uniform")
        gains = allocation_gains(layers, scores, allocation)
        if self.aim is None:
            budgets = [layer.budget for layer in layers]
            return allocate(budgets, prunable.other_conv_weights, self.compression, gains, floor=floor), {}
        latency = self._latency(state, prunable)
        return latency.search(
            lambda ms: latency.allocate(ms, gains, allocation.by_time, floor),
            lambda kernels: {
                layer.name: layer.layer.unview(mask)
                for layer, mask in zip(
                    layers, state.selection.choose_masks(layers, scores, kernels).values(), strict=True
                )
            },
        )

    def _hard_prune(self, state: ClickTrainState, prunable: PrunableLayers) -> list[Action]:
        masks = {layer.name: layer.layer.unview(state.masks[layer.name]) for layer in state.layers}
        return hard_prune(prunable, masks, compression_asked=self.compression_asked)

    def at_end(self, state: ClickTrainState, prunable: PrunableLayers) -> Sequence[Action]:
        """A run always ends at its target; magnitudes stand in for what was not measured."""
        actions: list[Action] = []
        while state.stage != "accelerated":
            actions += self._advance(state, prunable, state.entered, "the run ended")
        return actions

    def after_freeze(self, state: ClickTrainState, masks: Mapping[str, Tensor]) -> None:
        """The network holds the masks from here on."""
        del masks
        state.masks, state.layers = {}, ()
        state.selection.forget_choices()

    # ---- plan and state ---------------------------------------------------------------------

    def plan(
        self, prunable: PrunableLayers, length: RunLength, state: ClickTrainState | None = None
    ) -> PruningPlan:
        """Per layer: what is pruned, to what density and why; decisions, once they are made."""
        return clicktrain_plan(self, prunable, length, None if state is None else state.selection)

    def load_state(
        self, prunable: PrunableLayers, length: RunLength, saved: Mapping[str, Any]
    ) -> ClickTrainState:
        """Inverse of `state_dict`."""
        layers = self.targets(prunable)
        state = restored_state(ClickTrainState, saved, layers[0].weight.device)
        state.layers = layers
        if state.selection.kept:
            state.masks = {layer.name: state.selection.mask(layer) for layer in layers}
        return state


def _compression(prunable: PrunableLayers, masks: Mapping[str, Tensor]) -> float:
    kept = sum(int(mask.sum()) for mask in masks.values()) + prunable.other_conv_weights
    return prunable.conv_weights / max(kept, 1)


def _decision(layer: PatternLayer, kernels: int, selection: Selection) -> dict[str, Any]:
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "kernels_per_filter": kernels,
        "nnz_per_filter": kernels * layer.entries,
        "density": kernels * layer.budget.price / layer.budget.weights,
        "pattern_counts": selection.pattern_counts(layer) if layer.has_patterns else [],
    }
