"""A sparsity that rises over an era: masks by threshold, chosen after every step, then frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from clicktrain.graph.prunable import PrunableLayers
from clicktrain.methods.base import Action, ApplyMasks, Record, RunLength, StepInfo
from clicktrain.methods.masks.era import EraSettings
from clicktrain.methods.masks.masked import Masked, MaskState, Tensors
from clicktrain.methods.masks.threshold import CutSettings
from clicktrain.methods.triggers import KernelWatch
from clicktrain.runs.events import ThresholdEvent
from clicktrain.sparsity.masks import sparsity_of
from clicktrain.sparsity.schedules import Era


@dataclass(frozen=True, kw_only=True)
class Rising(CutSettings, EraSettings, Masked):
    """Granularity x criterion x schedule x trigger, enforced by masks (Campfire, Algorithm 2)."""

    same_everywhere: ClassVar[bool] = True

    regrow: bool = True
    """Inside the era pruned weights may come back (Algorithm 2); otherwise once zero is always zero."""
    gradient_memory: float = 0.9
    """Share of the old mean that each step keeps in the running mean of squared gradients."""

    @property
    def ck_threshold(self) -> float:
        """Where inter-epoch pruning goes from kernels to windows: the threshold in the middle of an era."""
        return self.threshold_at(self.sparsity, 0.5, Era(0.0, 1.0))

    @property
    def stages(self) -> tuple[str, ...]:
        """Dense, the era, masks are fixed."""
        return ("dense", "era", "fixed")

    @property
    def stable_from(self) -> float:
        """EPI from which the structure is stable."""
        return self.tau(self.criterion)

    def init(self, prunable: PrunableLayers, length: RunLength) -> MaskState:
        """Check that the run can be done as asked."""
        era = self.era_of(length)
        if self.trigger == "epi":
            self.warn_of_short_run(int(era.first_epoch), "where the era begins by itself")
        return super().init(prunable, length)

    def at_start(self, state: MaskState, prunable: PrunableLayers, length: RunLength) -> Sequence[Action]:
        """Mask the initial weights if the era has begun, with magnitudes: there are no gradients yet."""
        if self.batches(length)[0] > 0:
            return ()
        threshold = self.threshold_of(self.sparsity, 0, length)
        return [self._open_era(state, "epoch 0 begins"), *self._prune(state, prunable, threshold)]

    def before_step(self, state: MaskState, prunable: PrunableLayers, step: StepInfo) -> None:
        """Follow the gradients, if the criterion reads them, from the step that opens the era on."""
        before = step.seen + state.shift < self.batches(step.length)[0]
        if before and self.watches_structure:
            state.kernels.see(prunable.convs, self.criterion, step)
        if before or state.stage == "fixed" or not self.reads_gradient:
            return
        for layer in prunable.layers:
            grad = step.gradient(layer.weight)
            if grad is None:
                continue
            square = grad.float().square()
            mean = state.squares.get(layer.name)
            mean = square if mean is None else square.lerp_(mean, self.gradient_memory)
            state.squares[layer.name] = mean

    def wants_gradients(self, state: MaskState, length: RunLength, seen: int) -> bool:
        """Inside the era, where the optimizer moves pruned weights too, so that they may come back."""
        del length, seen
        return self.regrow and state.stage == "era"

    def after_step(self, state: MaskState, prunable: PrunableLayers, step: StepInfo) -> Sequence[Action]:
        """Choose the mask; after the last step of the era, for good (Algorithm 2)."""
        if state.stage == "fixed":
            return ()
        first, last = self.batches(step.length)
        reason = f"epoch {first / step.length.steps_per_epoch:g} begins"
        actions: list[Action] = []
        if step.seen + state.shift < first:
            if self.trigger == "own" or not step.ends_epoch:
                return ()
            latest = first // step.length.steps_per_epoch
            if self.watches_structure:
                actions.append(self._indicator(state, prunable, latest))
            if (begins := state.kernels.fires(self, self.trigger, self.stable_from, latest, step)) is None:
                return actions
            state.shift, reason = first - step.seen, begins
        seen = step.seen + state.shift
        if state.stage == "dense":
            actions.append(self._open_era(state, reason))
        if seen >= last:
            # An era without any length has chosen before the first step; that step must not choose again.
            chosen = state.masks if last == 0 and state.masks else None
            return [*actions, *self.fix(state, prunable, "the era is over", chosen)]
        threshold = self.threshold_of(self.sparsity, seen, step.length)
        return [*actions, *self._prune(state, prunable, threshold)]

    def cut_epoch(self, state: MaskState, length: RunLength, *, latest: bool = False) -> float | None:
        """At the end of the era; not known while a trigger may yet begin it."""
        if self.trigger != "own" and state.stage == "dense" and not latest:
            return None
        return (self.batches(length)[1] - state.shift) / length.steps_per_epoch

    def _open_era(self, state: MaskState, reason: str) -> Action:
        state.kernels = KernelWatch()
        return self.enter(state, "era", reason)

    def _prune(self, state: MaskState, prunable: PrunableLayers, threshold: float) -> list[Action]:
        """Choose the mask inside the era."""
        if threshold <= 0:
            return []  # Algorithm 2: nothing is pruned in the first epoch of the era
        actions: list[Action] = []
        state.masks = self._chosen(state, prunable, threshold)
        if threshold != state.threshold and self.rise == "epoch":
            now = sparsity_of(state.masks)
            actions.append(Record(ThresholdEvent(threshold=threshold, sparsity=now)))
        state.threshold = threshold
        return [*actions, ApplyMasks(state.masks)]

    def _chosen(self, state: MaskState, prunable: PrunableLayers, threshold: float) -> Tensors:
        """The masks at a threshold, from the weights as they are."""
        scores = {}
        for layer in prunable.layers:
            mean = state.squares.get(layer.name)
            scores[layer.name] = self.scores(layer, None if mean is None else mean.sqrt())
        old = {} if self.regrow else state.masks
        for name, mask in old.items():
            scores[name].masked_fill_(~mask, 0.0)  # what is gone ranks last
        masks = self.masks(prunable, scores, threshold, self.ck_threshold)
        return {name: mask & old[name] if name in old else mask for name, mask in masks.items()}

    def _indicator(self, state: MaskState, prunable: PrunableLayers, latest: int) -> Action:
        """EPI of the kernels that would be kept."""
        window, tau = self.window(latest), self.stable_from
        return state.kernels.close_epoch(prunable.convs, 1 - self.sparsity, window, tau, self.criterion)

    def last_masks(self, state: MaskState, prunable: PrunableLayers) -> Tensors:
        """The masks at the sparsity asked for."""
        return self._chosen(state, prunable, self.sparsity)
