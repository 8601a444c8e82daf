"""ClickTrain: patterns and kernels chosen while training, then fixed positions (sections 4.1 to 4.4).

Stages: 1 dense training until the loss settles; 2 dynamic pattern pool; 3 adaptive finalisation of patterns
and unimportant kernels; 4 regularisation of what will go; hard prune; 5 training on with fixed positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.graph.prunable import ConvLayer, PrunableLayers, check_convolutions, find_prunable, matches
from clicktrain.latency.sparse_times import Timed
from clicktrain.methods.base import (
    Action,
    FreezeMasks,
    Method,
    PruningPlan,
    Record,
    RunLength,
    StepInfo,
)
from clicktrain.methods.outcome import NOTED, Reached, Target, latency_target
from clicktrain.methods.patterns.latency import LatencyAim, SparseLatency
from clicktrain.methods.patterns.plan import clicktrain_plan
from clicktrain.methods.patterns.selection import Selection, allocation_gains, effective_group
from clicktrain.methods.patterns.selection import Target as LayerTarget
from clicktrain.methods.patterns.settings import check, fill_in
from clicktrain.methods.triggers import KernelWatch, default_threshold, default_window
from clicktrain.sparsity.allocation import LayerBudget, allocate, check_reachable
from clicktrain.sparsity.finalize import batch_counts
from clicktrain.sparsity.group_lasso import add_lasso_gradient_, shrink_groups_
from clicktrain.sparsity.importance import CRITERIA, CriterionChoice, magnitude_importance
from clicktrain.sparsity.masks import energy_outside
from clicktrain.sparsity.patterns import default_entries, fixed_pool
from clicktrain.sparsity.triggers import EarlyTriggerChoice

STAGES = ("dense", "pool", "finalize", "regularize", "accelerated")


@dataclass(slots=True)
class ClickTrainState:
    """What ClickTrain remembers between steps."""

    stage: str = "dense"
    entered: int = 0
    """Batches seen when the stage was entered."""
    counted: int = 0
    """Optimizer steps that this stage has used."""
    previous_loss: Tensor | None = None
    selection: Selection = field(default_factory=Selection)
    kernels: KernelWatch = field(default_factory=KernelWatch)
    """For trigger epi, in stage 1."""
    masks: dict[str, Tensor] = field(default_factory=dict)
    """Derived from the selection once it has decided."""
    latency: SparseLatency | None = field(default=None, compare=False)
    """Measured when it is needed, not saved."""


@dataclass(frozen=True, kw_only=True)
class ClickTrain(Method[ClickTrainState]):
    """Patterns inside kernels plus whole kernels, chosen while training (ClickTrain, ICS 2021).

    Settings left at None come from the preset. Lengths are shares of the run, so that the stages fit
    whatever its length; 0 means as short as can be (one step, or none for stages 2 and 4).
    """

    name: ClassVar[str] = "clicktrain"
    title: ClassVar[str] = "ClickTrain"

    compression: float = 8.0
    """All convolution weights / non-zero convolution weights at the end, over the whole network; with a
    latency as the target it is not used: it is what comes out."""
    preset: Literal["default", "paper", "one-shot"] = "default"
    """Where settings that are not given come from: what wins in short runs, the paper's own, or magnitudes
    once with fixed patterns (a baseline)."""
    patterns: int | None = None
    """Size N of the pattern pool (8 or 12 in the paper)."""
    entries: int = 4
    """Kept positions of a 3x3 kernel; other kernel sizes keep the same share."""
    group: int = 1
    """Neighbouring filters that choose their pattern and their kernels together; 1 is the paper's."""
    criterion: CriterionChoice | None = None
    """Importance of a weight: (g*w)^2 (the paper's), w^2, or |g|*w^2."""
    pool: Literal["dynamic", "fixed"] | None = None
    """Pattern pool generated while training (section 4.2), or 4, 8 or 12 given 3x3 patterns."""
    selection: Literal["votes", "accumulated"] | None = None
    """A kernel's pattern: most often best over batches (section 4.3), or best by importance summed over
    batches."""
    kernel_score: Literal["kernel", "pattern"] | None = None
    """Importance of a kernel: over all its positions (Eq. 2), or inside its chosen pattern."""
    allocation: Literal["uniform", "importance", "relative", "share", "erk"] | None = None
    """Kept kernels per layer: equal densities, by importance, by importance relative to the layer's mean or
    as a share of all of the layer's, or Erdos-Renyi-kernel."""
    allocation_floor: float = 0.2
    """Every layer keeps at least this share of the density that equal densities would give it."""
    latency_target: float | None = None
    """Time to end at, as a share of the dense network's, instead of a compression (on CPUs); kernels are then
    allocated by the time that they take, and allocation is share unless it is given."""
    latency_target_ms: float | None = None
    """Time to end at, in milliseconds per batch, instead of a compression."""
    latency_batch: int = 64
    """Images of the batch whose time counts."""
    latency_of: Timed = "inference"
    """The time that counts: inference, or a training step (forward and backward pass)."""
    layers: dict[str, float] = field(default_factory=dict)
    """Compression ratio of single layers, by module path (shell-style): the paper's fixed ratios."""
    exclude: tuple[str, ...] = ()
    """Convolutions to leave dense, by module path (shell-style)."""
    include: tuple[str, ...] = ()
    """Convolutions to prune although they would be left alone (the first, depthwise ones)."""
    trigger: EarlyTriggerChoice = "own"
    """Stage 2 starts by the loss (own), or when it is stable how many kernels each layer keeps (epi: When to
    Prune?, Eq. (4) to (6)); epi sets earliest_start to 0 unless it is given."""
    epi_threshold: float | None = None
    """EPI from which the structure is stable (trigger epi); 0.983 for magnitude, else 0.944, by default."""
    epi_window: int | None = None
    """Past epochs that a structure is compared with (trigger epi); a third of the longest stage 1 by default,
    5 at the most."""
    loss_slope: float = 0.27
    """Stage 2 starts when the mean training loss falls by less than this between epochs (section 4.1)."""
    earliest_start: float | None = None
    """Stage 2 does not start before this share of the run."""
    latest_start: float | None = None
    """Stage 2 starts at this share of the run at the latest."""
    pool_length: float | None = None
    """Length of stage 2, share of the run."""
    finalize_length: float | None = None
    """Length of stage 3, share of the run."""
    regularize_length: float | None = None
    """Length of stage 4, share of the run."""
    penalty: Literal["lasso", "shrink", "none"] | None = None
    """Stage 4: the modified group lasso (section 4.4), its proximal form with the strength set by the steps
    that are left, or nothing."""
    lasso: float = 0.00025
    """Coefficient of the group lasso (section 6.1)."""
    loss_margin: float = 0.0018
    """Batches whose loss rises are not counted in stage 3 (section 4.3)."""
    loss_margin_rule: Literal["ratio", "increase"] = "ratio"
    """The margin read literally (previous / current < margin), or as current > previous * (1 + margin)."""

    def __post_init__(self) -> None:
        """Fill in the preset and check every setting."""
        fill_in(self)
        super().__post_init__()
        check(self)

    @property
    def aim(self) -> LatencyAim | None:
        """The time to end at, if that is the target."""
        if self.latency_target is None and self.latency_target_ms is None:
            return None
        return LatencyAim(self.latency_target, self.latency_target_ms, self.latency_batch, self.latency_of)

    @property
    def compression_asked(self) -> float | None:
        """The compression ratio to end at; None if a latency is the target."""
        return None if self.aim is not None else self.compression

    # ---- what is pruned ---------------------------------------------------------------------

    def find_prunable(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> PrunableLayers:
        """Convolutions that may be pruned; ``exclude``, ``include`` and ``layers`` must name some."""
        prunable = find_prunable(model, trained, exclude=self.exclude, include=self.include)
        for glob in self.layers:
            if not any(matches(layer.name, [glob]) for layer in prunable.convs):
                raise UserError(f"no layer that can be pruned is called {glob!r} (setting 'layers')")
        return prunable

    def targets(self, prunable: PrunableLayers) -> tuple[LayerTarget, ...]:
        """The layers with their kept positions per kernel, group size and per-layer override."""
        return tuple(self._target(layer) for layer in prunable.convs)

    def _target(self, layer: ConvLayer) -> LayerTarget:
        f, c, r, s = layer.shape
        entries = default_entries((r, s), self.entries)
        if self.pool == "fixed" and (r, s) != (3, 3):
            entries = r * s  # the given patterns are 3 x 3: other kernels are kept or dropped whole
        ratio = next((v for glob, v in self.layers.items() if matches(layer.name, [glob])), None)
        fixed = None
        if ratio is not None:
            least = r * s / entries
            if ratio < 0.99 * least:
                raise UserError(
                    f"layers asks for {ratio:g}x in {layer.name}, but keeping {entries} of {r * s} positions "
                    f"per kernel is {least:.2f}x at the least: ask for more, or exclude the layer"
                )
            fixed = LayerBudget(layer.name, f, c, entries, r * s).kernels_for_density(1 / ratio)
        return LayerTarget(layer, entries, effective_group(f, self.group), fixed)

    # ---- when -------------------------------------------------------------------------------

    def schedule(self, length: RunLength) -> dict[str, int]:
        """Batches: ``earliest`` and ``latest`` start of stage 2 and the lengths of stages 2 to 4.

        Raises:
            UserError: the run is too short for its stages.
        """
        total = length.total
        lengths = {
            "pool": self._batches(self.pool_length, total) if self.pool == "dynamic" else 0,
            "finalize": max(1, self._batches(self.finalize_length, total)),
            "regularize": self._batches(self.regularize_length, total) if self.penalty != "none" else 0,
        }
        if self.pool == "dynamic":
            lengths["pool"] = max(1, lengths["pool"])
        latest = max(1, round((self.latest_start or 0) * total))
        latest = min(latest, total - sum(lengths.values()) - 1)
        if latest < 1:
            need = sum(lengths.values()) + 2
            raise UserError(
                f"a run of {total} batches is too short for the stages of ClickTrain, which need {need} here"
            )
        earliest = min(latest, max(1, round((self.earliest_start or 0) * total)))
        return {"earliest": earliest, "latest": latest, **lengths}

    @staticmethod
    def _batches(share: float | None, total: int) -> int:
        return max(1, round(share * total)) if share else 0

    # ---- life cycle -------------------------------------------------------------------------

    def init(self, prunable: PrunableLayers, length: RunLength) -> ClickTrainState:
        """Check that the run can be done as asked."""
        check_convolutions(prunable, "ClickTrain")
        CRITERIA.resolve(self.criterion or "taylor")
        self.schedule(length)
        state = ClickTrainState(entered=0)
        if self.aim is not None:
            self._latency(
                state, prunable
            )  # now: a target out of reach is not to be told when the run is half over
        else:
            check_reachable(
                [t.budget for t in self.targets(prunable)], prunable.other_conv_weights, self.compression
            )
        return state

    def _latency(self, state: ClickTrainState, prunable: PrunableLayers) -> SparseLatency:
        if state.latency is None:
            assert self.aim is not None
            state.latency = SparseLatency(prunable, self.targets(prunable), self.patterns or 1, self.aim)
        return state.latency

    def targets_of(self, state: ClickTrainState, reached: Reached) -> Sequence[Target]:
        """The compression of all convolution weights, or the time."""
        del state
        if self.aim is not None:
            event = reached.last_event("finalised", "predicted_ms")
            timed = {"inference": "inference time", "training": "time of a training step"}
            return [
                latency_target(
                    event, self.latency_target, self.latency_target_ms, timed.get(self.latency_of, "time")
                )
            ]
        compression = reached.conv_weights_now / max(reached.conv_nonzero, 1)
        reason = "each filter of a layer keeps as many whole kernels"
        if self.layers:
            reason += ", and 'layers' fixes some"
        target = Target("compression of convolution weights", self.compression, compression, "times")
        return [replace(target, reason=reason if abs(compression / self.compression - 1) > NOTED else "")]

    def stage(self, state: ClickTrainState) -> str:
        """dense, pool, finalize, regularize or accelerated."""
        return state.stage

    def before_step(self, state: ClickTrainState, prunable: PrunableLayers, step: StepInfo) -> None:
        """Stages 2 and 3 read the gradients, stage 4 adds the lasso's."""
        if state.stage == "regularize":
            if self.penalty == "lasso":
                self._add_lasso(state, prunable, step)
        elif state.stage in ("pool", "finalize"):
            self._read(state, prunable, step)
        elif state.stage == "dense" and self.watches_structure:
            state.kernels.see(prunable.convs, self.criterion or "taylor", step)

    def _read(self, state: ClickTrainState, prunable: PrunableLayers, step: StepInfo) -> None:
        criterion = CRITERIA.resolve(self.criterion or "taylor")
        weight = batch_counts(state.previous_loss, step.loss, self.loss_margin, self.loss_margin_rule)
        for target in self.targets(prunable):
            parameter = target.layer.weight
            grad = step.gradient(parameter)
            if grad is None:
                continue
            importance = criterion(parameter.detach().float(), grad.float())
            if state.stage == "pool":
                state.selection.propose(target, importance)
            else:
                state.selection.vote(target, importance, weight)
        state.previous_loss = step.loss
        state.counted += 1

    def _add_lasso(self, state: ClickTrainState, prunable: PrunableLayers, step: StepInfo) -> None:
        coefficient: float | Tensor = self.lasso
        if step.grad_scale is not None:
            coefficient = step.grad_scale * self.lasso
        for layer in prunable.convs:
            if layer.weight.grad is not None:
                add_lasso_gradient_(
                    layer.weight.grad, layer.weight.detach(), state.masks[layer.name], coefficient
                )

    def after_step(
        self, state: ClickTrainState, prunable: PrunableLayers, step: StepInfo
    ) -> Sequence[Action]:
        """Move on to the next stage when it is time."""
        lengths = self.schedule(step.length)
        if state.stage == "regularize" and self.penalty == "shrink":
            left = state.entered + lengths["regularize"] - step.seen
            if left > 0:
                for layer in prunable.convs:
                    shrink_groups_(layer.weight, state.masks[layer.name], math.ceil(left / step.batches))
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
            return state.kernels.fires(trigger, step, self.epi_fires_from, self.loss_slope)
        over = step.seen - state.entered >= lengths[state.stage]
        reads = state.stage == "finalize" or (state.stage == "pool" and lengths["pool"] > 0)
        return "its length is over" if over and (state.counted > 0 or not reads) else None

    @property
    def watches_structure(self) -> bool:
        """Whether the trigger reads EPI."""
        return self.trigger not in ("own", "loss_slope")

    @property
    def epi_fires_from(self) -> float:
        """EPI from which the structure is stable (trigger epi)."""
        default = default_threshold(self.criterion or "taylor")
        return default if self.epi_threshold is None else self.epi_threshold

    def epi_epochs(self, length: RunLength) -> int:
        """Past epochs that a structure is compared with (trigger epi)."""
        return self.epi_window or default_window(self.schedule(length)["latest"] // length.steps_per_epoch)

    def _indicator(self, state: ClickTrainState, prunable: PrunableLayers, length: RunLength) -> Action:
        """EPI of the kernels that would be kept: as many as equal densities leave, wherever they are."""
        budgets = [target.budget for target in self.targets(prunable)]
        if self.aim is None:
            even = allocate(budgets, prunable.other_conv_weights, self.compression)
        else:
            even = self._latency(state, prunable).even()[1]
        kept = sum(even[layer.name] * layer.shape[0] for layer in prunable.convs)
        share = kept / sum(layer.shape[0] * layer.shape[1] for layer in prunable.convs)
        return state.kernels.close_epoch(
            prunable.convs, share, self.epi_epochs(length), self.epi_fires_from, self.criterion or "taylor"
        )

    def _advance(
        self, state: ClickTrainState, prunable: PrunableLayers, seen: int, reason: str
    ) -> list[Action]:
        """Close the current stage and enter the next."""
        actions: list[Action] = []
        self._fill_in(state, prunable)
        if state.stage == "pool":
            actions.append(self._close_pools(state, prunable))
        elif state.stage == "finalize":
            actions.append(self._finalize(state, prunable))
        elif state.stage == "regularize":
            actions += self._hard_prune(state, prunable)
        state.kernels = KernelWatch()
        state.stage = STAGES[STAGES.index(state.stage) + 1]
        state.entered, state.counted = seen, 0
        number = STAGES.index(state.stage) + 1
        actions.append(Record({"event": "stage", "stage": state.stage, "number": number, "reason": reason}))
        return actions

    def _close_pools(self, state: ClickTrainState, prunable: PrunableLayers) -> Action:
        selection = state.selection
        if self.pool == "fixed":
            selection.pools[3, 3] = fixed_pool(self.patterns or 0)
        selection.close_pools(self.targets(prunable), self.patterns or 0)
        pools = []
        for shape, pool in selection.pools.items():
            votes = selection.candidates.get(shape)
            score = (
                {} if votes is None else dict(zip(votes.bits.tolist(), votes.counts.tolist(), strict=True))
            )
            shown = [{"bits": p.bits, "score": score.get(p.bits)} for p in pool.patterns]
            pools.append({"shape": list(shape), "patterns": shown, "candidates": len(score)})
        selection.candidates = {}
        return Record({"event": "pool", "pools": pools})

    def _finalize(self, state: ClickTrainState, prunable: PrunableLayers) -> Action:
        """Fix patterns and kernels: sections 4.1 and 4.3, with the budget allocated over layers."""
        targets, selection = self.targets(prunable), state.selection
        for target in targets:
            selection.choose_patterns(target, self.selection == "votes")
        scores = {t.layer.name: selection.scores(t, self.kernel_score == "pattern") for t in targets}
        gains = allocation_gains(targets, scores, self.allocation or "uniform")
        kernels, about = self._kernels(state, prunable, scores, gains)
        state.masks = _chosen(selection, targets, scores, kernels)
        state.latency = None
        selection.forget_gradients()
        return Record(
            {
                "event": "finalised",
                "compression_asked": self.compression_asked,
                "compression_reached": _compression(prunable, state.masks),
                **about,
                "layers": [_decision(t, kernels[t.layer.name], selection) for t in targets],
            }
        )

    def _kernels(
        self,
        state: ClickTrainState,
        prunable: PrunableLayers,
        scores: Mapping[str, Tensor],
        gains: Mapping[str, Tensor] | None,
    ) -> tuple[dict[str, int], dict[str, Any]]:
        """Kept kernels per filter of every layer, and what to write down about a latency."""
        targets, floor = self.targets(prunable), self.allocation_floor
        if self.aim is None:
            budgets = [t.budget for t in targets]
            return allocate(budgets, prunable.other_conv_weights, self.compression, gains, floor=floor), {}
        latency = self._latency(state, prunable)
        by_time = self.allocation in ("importance", "relative", "share")
        return latency.search(
            lambda ms: latency.allocate(ms, gains, by_time, floor),
            lambda kernels: _chosen(state.selection, targets, scores, kernels),
            prunable.measure,
        )

    def _hard_prune(self, state: ClickTrainState, prunable: PrunableLayers) -> list[Action]:
        energies = [energy_outside(layer.weight, state.masks[layer.name]) for layer in prunable.convs]
        lost, whole = (sum(part) for part in zip(*energies, strict=True))
        event = {
            "event": "hard_prune",
            "compression_asked": self.compression_asked,
            "compression_reached": _compression(prunable, state.masks),
            "energy_outside": lost / whole if whole else 0.0,
        }
        return [Record(event), FreezeMasks(dict(state.masks))]

    def at_end(self, state: ClickTrainState, prunable: PrunableLayers) -> Sequence[Action]:
        """A run always ends at the compression asked for; magnitudes stand in for what was not measured."""
        actions: list[Action] = []
        while state.stage != "accelerated":
            actions += self._advance(state, prunable, state.entered, "the run ended")
        return actions

    def after_freeze(self, state: ClickTrainState, masks: Mapping[str, Tensor]) -> None:
        """The network holds the masks from here on."""
        del masks
        state.masks = {}
        state.selection.forget_choices()

    def _fill_in(self, state: ClickTrainState, prunable: PrunableLayers) -> None:
        """Before a stage is closed: layers whose gradients it never saw take part by their magnitudes."""
        selection = state.selection
        proposed = set(selection.candidates)
        for target in self.targets(prunable):
            weight = target.layer.weight.detach().float()
            missing = target.kernel_shape not in proposed
            if state.stage == "pool" and self.pool == "dynamic" and missing:
                selection.propose(target, magnitude_importance(weight, weight))
            elif state.stage == "finalize" and target.layer.name not in selection.importance:
                selection.vote(target, magnitude_importance(weight, weight), weight.new_ones(()))

    # ---- what is shown and saved ------------------------------------------------------------

    def plan(
        self, prunable: PrunableLayers, length: RunLength, state: ClickTrainState | None = None
    ) -> PruningPlan:
        """Per layer: what is pruned, to what density, by what; what was decided once it is."""
        return clicktrain_plan(self, prunable, length, None if state is None else state.selection)

    def state_dict(self, state: ClickTrainState) -> dict[str, Any]:
        """Nested dicts of tensors, numbers and strings."""
        return {
            "stage": state.stage,
            "entered": state.entered,
            "counted": state.counted,
            "previous_loss": state.previous_loss,
            "selection": state.selection.state_dict(),
            "kernels": state.kernels.state_dict(),
        }

    def load_state(
        self, prunable: PrunableLayers, length: RunLength, saved: Mapping[str, Any]
    ) -> ClickTrainState:
        """Inverse of `state_dict`."""
        targets = self.targets(prunable)
        device = targets[0].layer.weight.device
        previous = saved["previous_loss"]
        state = ClickTrainState(
            saved["stage"],
            saved["entered"],
            saved["counted"],
            None if previous is None else previous.to(device),
            Selection.from_state_dict(saved["selection"], device),
        )
        if "kernels" in saved:  # not in states of older versions, which knew no EPI
            state.kernels = KernelWatch.from_state(saved["kernels"], lambda t: t.to(device, copy=True))
        if state.selection.kept:
            state.masks = {t.layer.name: state.selection.mask(t) for t in targets}
        return state


def _chosen(
    selection: Selection,
    targets: Sequence[LayerTarget],
    scores: Mapping[str, Tensor],
    kernels: Mapping[str, int],
) -> dict[str, Tensor]:
    """Let the selection keep so many kernels per filter; the masks."""
    for target in targets:
        selection.choose_kernels(target, scores[target.layer.name], kernels[target.layer.name])
    return {target.layer.name: selection.mask(target) for target in targets}


def _compression(prunable: PrunableLayers, masks: Mapping[str, Tensor]) -> float:
    kept = sum(int(mask.sum()) for mask in masks.values()) + prunable.other_conv_weights
    return prunable.conv_weights / max(kept, 1)


def _decision(target: LayerTarget, kernels: int, selection: Selection) -> dict[str, Any]:
    budget = target.budget
    return {
        "name": target.layer.name,
        "shape": list(target.layer.shape),
        "kernels_per_filter": kernels,
        "nnz_per_filter": kernels * target.entries,
        "density": kernels * budget.price / budget.weights,
        "pattern_counts": selection.pattern_counts(target) if target.has_patterns else [],
    }
