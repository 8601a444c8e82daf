"""Campfire: masks by magnitude over a pruning era early in training, then fixed positions (sections 2, A).

Stages: dense training; the era, in which the mask is evaluated anew after every step at the threshold of
Eq. (1); fixed positions to the end. Inside the era a pruned weight is zero in every forward pass and gets
its gradient, so that a step may bring it back among the large ones: this is Algorithm 2. Section 2 also says
that a zero stays zero "for the rest of the training period"; ``regrow`` chooses.

An era that begins with the run masks the initial weights, before the first step. An era that ends where it
begins prunes once: at the very start that is pruning after training (of weights trained elsewhere), or a
fixed random network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.formats.packed import bits_from_mask, mask_from_bits
from clicktrain.graph.prunable import (
    ConvLayer,
    LinearLayer,
    PrunableLayers,
    check_convolutions,
    find_prunable,
)
from clicktrain.methods.base import (
    Action,
    ApplyMasks,
    FreezeMasks,
    LayerPlan,
    Method,
    PruningPlan,
    Record,
    RunLength,
    StepInfo,
    plan_rows,
)
from clicktrain.methods.masks.kernel_watch import KernelWatch, default_threshold
from clicktrain.methods.masks.threshold import Granularity, Linear, MaskRule
from clicktrain.methods.outcome import Reached, Target, planned_far_off, sparsity_target
from clicktrain.methods.triggers import default_window
from clicktrain.sparsity.fully_connected import MAX_BLOCK
from clicktrain.sparsity.granularity import Within
from clicktrain.sparsity.importance import CRITERIA, CriterionChoice, magnitude_importance, reads_gradient
from clicktrain.sparsity.masks import KeptWeights, conv_masks, energy_outside, kept_weights, sparsity_of
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.schedules import Era, campfire_threshold

PRESETS: dict[str, tuple[float, float]] = {
    "default": (0.3, 0.5),  # section 4: era 30-50 of 100 epochs
    "from-scratch": (0.0, 0.3),  # Tables 4 and 5: "start 0, era 0-30"
    "after-training": (0.0, 0.0),
}
"""First and last epoch of the era, as shares of the run."""


@dataclass(slots=True)
class CampfireState:
    """What Campfire remembers between steps."""

    stage: str = "dense"
    threshold: float = 0.0
    masks: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)
    """Running mean of the squared gradient per layer, for criteria that read gradients."""
    shift: int = 0
    """Batches by which the era began earlier than it would have (trigger epi)."""
    kernels: KernelWatch = field(default_factory=KernelWatch)
    """For trigger epi, before the era."""
    kept: dict[str, KeptWeights] = field(default_factory=dict)
    """What the frozen masks keep per layer; the masks themselves are the network's then."""


@dataclass(frozen=True, kw_only=True)
class Campfire(Method[CampfireState]):
    """Structured masks by magnitude, fixed early, without regularisation (Campfire, 2020)."""

    name: ClassVar[str] = "campfire"
    title: ClassVar[str] = "Campfire"

    preset: Literal["default", "from-scratch", "after-training"] = "default"
    """Where the era lies if it is not given: 30% to 50% of the run, its first 30%, or, on weights that are
    trained already (--initial-weights), all at once before the first step."""
    sparsity: float = 0.6
    """Share of each pruned layer's weights that is zero at the end (the threshold; true sparsity may be
    higher, as kernels and filters are whole numbers)."""
    granularity: Granularity = "combined"
    """What goes: the smallest of each kernel, whole kernels, both, both one after the other, or all but a
    pattern of each kernel and then whole kernels."""
    initial_sparsity: float = 0.0
    """Threshold with which the era begins."""
    era: tuple[float, float] | None = None
    """First and last epoch of pruning, from 0 (the same twice: all at once); the preset's by default."""
    trigger: Literal["own", "epi"] = "own"
    """The era begins at its epoch (own), or as soon as it is stable how many kernels each layer keeps (epi:
    When to Prune?, Eq. (4) to (6)), at its epoch at the latest; its length stays."""
    epi_threshold: float | None = None
    """EPI from which the structure is stable (trigger epi); 0.983 for magnitude, else 0.944, by default."""
    epi_window: int | None = None
    """Past epochs that a structure is compared with (trigger epi); a third of the epochs before the era by
    default, 5 at the most."""
    exponent: float = 3.0
    """Exponent r of the schedule; larger rises sooner."""
    rise: Literal["epoch", "step"] = "epoch"
    """The threshold rises from epoch to epoch (the paper's), or from step to step."""
    regrow: bool = True
    """Inside the era pruned weights may come back (Algorithm 2); otherwise once zero is always zero."""
    criterion: CriterionChoice = "magnitude"
    """Importance of a weight: (g*w)^2, w^2 (the paper's), or |g|*w^2."""
    gradient_memory: float = 0.9
    """Share of the old mean that each step keeps in the running mean of squared gradients."""
    within: Within = "channel"
    """Whole kernels compete within an input channel (Algorithm 1), or within a filter, so that all filters
    keep equally many."""
    max_non_zero: int | None = None
    """At most so many of the 9 weights of a 3x3 kernel stay as soon as the threshold is above 0 (window,
    combined, pattern); other kernel sizes keep the same share."""
    window_share: float = 0.8
    """Share of the threshold that is pruned inside kernels (combined, pattern)."""
    patterns: int = 8
    """Size of the pattern pool per kernel shape (pattern)."""
    linear: Linear = "fine"
    """Fully connected layers: single weights over the layer, blocks, or left dense."""
    block: int = 4
    """Side of the blocks of fully connected layers."""
    exclude: tuple[str, ...] = ()
    """Layers to leave dense, by module path (shell-style)."""
    include: tuple[str, ...] = ()
    """Convolutions to prune although they would be left alone (the first, depthwise ones)."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        if not 0 < self.sparsity < 1:
            raise UserError(f"sparsity must be between 0 and 1 (0.6 keeps 40%), not {self.sparsity}")
        if not 0 <= self.initial_sparsity <= self.sparsity:
            raise UserError(f"initial_sparsity must be between 0 and sparsity, not {self.initial_sparsity}")
        if self.era is not None:
            object.__setattr__(self, "era", tuple(self.era))
            if not 0 <= self.era[0] <= self.era[1]:
                raise UserError(
                    f"era is the first and the last epoch of pruning, as in 30 50, not {list(self.era)}"
                )
        for key in ("gradient_memory", "window_share"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 0 and below 1, not {getattr(self, key)}")
        if self.epi_threshold is not None and not 0 <= self.epi_threshold <= 1:
            raise UserError(f"epi_threshold must be between 0 and 1, not {self.epi_threshold}")
        if self.epi_window is not None and self.epi_window < 1:
            raise UserError(f"epi_window must be at least 1, not {self.epi_window}")
        if not 0 < self.exponent < math.inf:
            raise UserError(f"exponent must be above 0, not {self.exponent}")
        if not 1 <= self.block <= MAX_BLOCK:
            raise UserError(f"block must be 1 to {MAX_BLOCK}, not {self.block}")
        if self.max_non_zero is not None and not 1 <= self.max_non_zero <= 9:
            raise UserError(
                f"max_non_zero is a number of weights of a 3x3 kernel, 1 to 9, not {self.max_non_zero}"
            )
        if self.patterns < 1:
            raise UserError(f"patterns must be at least 1, not {self.patterns}")

    # ---- what and when ----------------------------------------------------------------------

    @property
    def expects_trained(self) -> bool:
        """Pruning after training needs a network that has been trained."""
        return self.preset == "after-training"

    def find_prunable(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> PrunableLayers:
        """Convolutions, and fully connected layers unless they are to stay dense."""
        return find_prunable(
            model, trained, exclude=self.exclude, include=self.include, linear=self.linear != "none"
        )

    def era_of(self, length: RunLength) -> Era:
        """The pruning era, in epochs.

        Raises:
            UserError: it ends after the run does, or holds no batch although it is to be longer than that.
        """
        era = Era.of_run(length.epochs, *PRESETS[self.preset]) if self.era is None else Era(*self.era)
        if era.last_epoch > length.epochs:
            raise UserError(
                f"the era ends at epoch {era.last_epoch:g} but the run has {length.epochs}: end it earlier"
            )
        first, last = self._batches(era, length)
        if first >= last and era.length > 0:
            raise UserError(
                f"the era {era.first_epoch:g}-{era.last_epoch:g} holds no batch "
                f"(an epoch has {length.steps_per_epoch}): make it longer"
            )
        return era

    @staticmethod
    def _batches(era: Era, length: RunLength) -> tuple[int, int]:
        """Batches seen when the era begins and when it is over."""
        return round(era.first_epoch * length.steps_per_epoch), round(era.last_epoch * length.steps_per_epoch)

    def threshold_after(self, seen: int, length: RunLength) -> float:
        """Eq. (1) for the batch that follows ``seen`` batches, whose forward pass the mask is for."""
        era = self.era_of(length)
        first, last = self._batches(era, length)
        if seen >= last:
            return self.sparsity
        if seen < first:
            return 0.0
        done = (seen - first) / length.steps_per_epoch
        epoch = era.first_epoch + (done if self.rise == "step" else math.floor(done))
        return self._threshold(epoch, era)

    def _threshold(self, epoch: float, era: Era) -> float:
        return campfire_threshold(epoch, era, self.sparsity, self.initial_sparsity, self.exponent)

    # ---- which ------------------------------------------------------------------------------

    @property
    def rule(self) -> MaskRule:
        """From scores and a threshold to masks."""
        return MaskRule(
            granularity=self.granularity,
            within=self.within,
            window_share=self.window_share,
            max_non_zero=self.max_non_zero,
            patterns=self.patterns,
            ck_threshold=self._threshold(0.5, Era(0.0, 1.0)),
            block=self.block if self.linear == "block" else None,
        )

    def _scores(self, state: CampfireState, layer: ConvLayer | LinearLayer) -> Tensor:
        weight = layer.weight.detach().float()
        squares = state.squares.get(layer.name)
        criterion = CRITERIA.resolve(self.criterion)
        if squares is None:  # magnitudes for a layer that has had no gradient yet
            return (magnitude_importance if reads_gradient(criterion) else criterion)(weight, weight)
        return criterion(weight, squares.sqrt())

    def _evaluate(
        self, state: CampfireState, prunable: PrunableLayers, threshold: float
    ) -> dict[str, Tensor]:
        """The masks at a threshold, from the weights as they are."""
        scores = {layer.name: self._scores(state, layer) for layer in prunable.layers}
        old = {} if self.regrow else state.masks
        for name, mask in old.items():
            scores[name].masked_fill_(~mask, 0.0)  # what is gone ranks last
        masks = self.rule.masks(prunable, scores, threshold)
        return {name: mask & old[name] if name in old else mask for name, mask in masks.items()}

    # ---- life cycle -------------------------------------------------------------------------

    def init(self, prunable: PrunableLayers, length: RunLength) -> CampfireState:
        """Check that the run can be done as asked."""
        check_convolutions(prunable, "Campfire")
        self.era_of(length)
        return CampfireState()

    def stage(self, state: CampfireState) -> str:
        """dense, era or fixed."""
        return state.stage

    def at_start(self, state: CampfireState, prunable: PrunableLayers, length: RunLength) -> Sequence[Action]:
        """Mask the initial weights if the era has begun, with magnitudes: there are no gradients yet."""
        first, _ = self._batches(self.era_of(length), length)
        if first > 0:
            return ()
        return [
            self._open_era(state, "epoch 0 begins"),
            *self._prune(state, prunable, self.threshold_after(0, length)),
        ]

    def before_step(self, state: CampfireState, prunable: PrunableLayers, step: StepInfo) -> None:
        """Follow the gradients, if the criterion reads them, from the step that opens the era on."""
        first, _ = self._batches(self.era_of(step.length), step.length)
        before = step.seen + state.shift < first
        if before and self.trigger == "epi":
            state.kernels.see(prunable.convs, self.criterion, step)
        if before or not reads_gradient(CRITERIA.resolve(self.criterion)):
            return
        for layer in prunable.layers:
            grad = step.gradient(layer.weight)
            if grad is None:
                continue
            square = grad.float().square()
            mean = state.squares.get(layer.name)
            mean = square if mean is None else square.lerp_(mean, self.gradient_memory)
            state.squares[layer.name] = mean

    def after_step(self, state: CampfireState, prunable: PrunableLayers, step: StepInfo) -> Sequence[Action]:
        """Evaluate the mask anew; after the last step of the era, for good (Algorithm 2)."""
        first, last = self._batches(self.era_of(step.length), step.length)
        reason = f"epoch {first / step.length.steps_per_epoch:g} begins"
        actions: list[Action] = []
        if step.seen + state.shift < first:
            if self.trigger == "own" or not step.ends_epoch:
                return ()
            actions.append(self._indicator(state, prunable, first // step.length.steps_per_epoch))
            if (stable := state.kernels.fires(self._epi_threshold)) is None:
                return actions
            state.shift, reason = first - step.seen, stable
        seen = step.seen + state.shift
        if state.stage == "dense":
            actions.append(self._open_era(state, reason))
        if seen >= last:
            # An era without any length has chosen before the first step; that step must not choose again.
            keep = last == 0 and bool(state.masks)
            return [*actions, *self._fix(state, prunable, "the era is over", keep=keep)]
        return [*actions, *self._prune(state, prunable, self.threshold_after(seen, step.length))]

    def _open_era(self, state: CampfireState, reason: str) -> Action:
        state.stage, state.kernels = "era", KernelWatch()
        return Record({"event": "stage", "stage": "era", "number": 2, "reason": reason})

    def _prune(self, state: CampfireState, prunable: PrunableLayers, threshold: float) -> list[Action]:
        """Evaluate the mask inside the era."""
        if threshold <= 0:
            return []  # Algorithm 2: nothing is pruned in the first epoch of the era
        actions: list[Action] = []
        state.masks = self._evaluate(state, prunable, threshold)
        if threshold != state.threshold and self.rise == "epoch":
            now = sparsity_of(state.masks)
            actions.append(Record({"event": "threshold", "threshold": threshold, "sparsity": now}))
        state.threshold = threshold
        return [*actions, ApplyMasks(state.masks)]

    @property
    def _epi_threshold(self) -> float:
        return default_threshold(self.criterion) if self.epi_threshold is None else self.epi_threshold

    def _indicator(self, state: CampfireState, prunable: PrunableLayers, latest: int) -> Action:
        """EPI of the kernels that would be kept."""
        window = self.epi_window or default_window(latest)
        return state.kernels.close_epoch(
            prunable.convs, 1 - self.sparsity, window, self._epi_threshold, self.criterion
        )

    def _fix(
        self, state: CampfireState, prunable: PrunableLayers, reason: str, *, keep: bool = False
    ) -> list[Action]:
        """Evaluate the mask at the final threshold (or ``keep`` what it is) and fix it."""
        if not keep:
            state.masks = self._evaluate(state, prunable, self.sparsity)
        state.threshold, state.stage, state.squares = self.sparsity, "fixed", {}
        energies = [energy_outside(layer.weight, state.masks[layer.name]) for layer in prunable.layers]
        lost, whole = (sum(part) for part in zip(*energies, strict=True))
        pruned = sum(mask.numel() - int(mask.sum()) for mask in conv_masks(state.masks).values())
        event = {
            "event": "hard_prune",
            "sparsity_asked": self.sparsity,
            "sparsity_reached": sparsity_of(state.masks),
            "compression_reached": prunable.conv_weights / max(prunable.conv_weights - pruned, 1),
            "energy_outside": lost / whole if whole else 0.0,
            "layers": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "target_sparsity": self.sparsity,
                    "true_sparsity": sparsity_of({layer.name: state.masks[layer.name]}),
                }
                for layer in prunable.layers
            ],
        }
        stage = {"event": "stage", "stage": "fixed", "number": 3, "reason": reason}
        return [Record(event), FreezeMasks(dict(state.masks)), Record(stage)]

    def at_end(self, state: CampfireState, prunable: PrunableLayers) -> Sequence[Action]:
        """A run always ends at the sparsity asked for."""
        return () if state.stage == "fixed" else self._fix(state, prunable, "the run ended")

    def targets_of(self, state: CampfireState, reached: Reached) -> Sequence[Target]:
        """Sparsity of the layers that are pruned."""
        del state
        return [sparsity_target(self.sparsity, reached, "whole kernels, positions and blocks are pruned")]

    def after_freeze(self, state: CampfireState, masks: Mapping[str, Tensor]) -> None:
        """The network holds the masks from here on."""
        state.kept = {name: kept_weights(mask) for name, mask in masks.items()}
        state.masks = {}

    # ---- what is shown and saved ------------------------------------------------------------

    def plan(
        self, prunable: PrunableLayers, length: RunLength, state: CampfireState | None = None
    ) -> PruningPlan:
        """Per layer: what is pruned, target and true sparsity; what was decided once it is."""
        reached = {} if state is None else state.kept
        rows = []
        for layer in prunable.layers:
            what, sparsity, note = self.rule.describe(layer, self.sparsity)
            per_filter = None
            if layer.name in reached:
                nonzero, per_filter = reached[layer.name]
                sparsity = 1 - nonzero / math.prod(layer.shape)
            why = f"target sparsity {self.sparsity:.3f}, true {sparsity:.3f}{note}"
            rows.append(LayerPlan(layer.name, layer.shape, what, 1 - sparsity, per_filter, why))
        weights = sum(math.prod(row.shape) for row in rows)
        pruned = sum((1 - (row.density or 0.0)) * math.prod(row.shape) for row in rows)
        summary = (
            f"sparsity asked {self.sparsity:g}, {'reached' if reached else 'planned'} "
            f"{pruned / max(weights, 1):.3f} of the weights of {len(rows)} layers"
            f"{planned_far_off(self.sparsity, pruned / max(weights, 1))}"
        )
        return PruningPlan(plan_rows(prunable, rows), summary, self._stage_lines(length))

    def _stage_lines(self, length: RunLength) -> tuple[tuple[str, str], ...]:
        era = self.era_of(length)
        every = {"epoch": "by epoch", "step": "by step"}[self.rise]
        rise = f"{self.initial_sparsity:g} to {self.sparsity:g} {every}, exponent {self.exponent:g}"
        rise = rise if era.length else f"{self.sparsity:g} all at once"
        early, until = "", f"until epoch {era.last_epoch:g}"
        if self.trigger == "epi":
            early = f" at the latest, or until EPI is at least {self._epi_threshold:g}"
            until = f"{era.length:g} epochs"
        back = "weights may come back" if self.regrow else "zeros stay"
        return (
            ("stage 1 dense", f"until epoch {era.first_epoch:g}{early}"),
            (
                "stage 2 era",
                f"{until}, {rise}, {self.granularity} by {choice_name(self.criterion)}, {back}",
            ),
            ("stage 3 fixed", "to the end, positions fixed"),
        )

    def state_dict(self, state: CampfireState) -> dict[str, Any]:
        """Nested dicts of tensors, numbers and strings; masks with one bit a weight."""
        return {
            "stage": state.stage,
            "threshold": state.threshold,
            "masks": {name: bits_from_mask(mask) for name, mask in state.masks.items()},
            "squares": dict(state.squares),
            "shift": state.shift,
            "kernels": state.kernels.state_dict(),
            "kept": {name: list(counts) for name, counts in state.kept.items()},
        }

    def load_state(
        self, prunable: PrunableLayers, length: RunLength, saved: Mapping[str, Any]
    ) -> CampfireState:
        """Inverse of `state_dict`."""
        del length
        masks, squares = {}, {}
        for layer in prunable.layers:
            device = layer.weight.device
            if layer.name in saved["masks"]:
                masks[layer.name] = mask_from_bits(saved["masks"][layer.name].to(device), layer.shape)
            if layer.name in saved["squares"]:
                squares[layer.name] = saved["squares"][layer.name].to(device, copy=True)
        state = CampfireState(saved["stage"], saved["threshold"], masks, squares, saved.get("shift", 0))
        state.kept = {name: (nonzero, each) for name, (nonzero, each) in saved.get("kept", {}).items()}
        if state.stage == "fixed" and masks:  # states of older versions keep the masks
            self.after_freeze(state, masks)
        if "kernels" in saved:  # not in states of older versions, which knew no EPI
            device = prunable.layers[0].weight.device
            state.kernels = KernelWatch.from_state(saved["kernels"], lambda t: t.to(device, copy=True))
        return state
