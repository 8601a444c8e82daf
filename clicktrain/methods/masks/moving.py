"""Units that are dropped and grow at times during a run: what RigL, DSR, GraNet, MEST and GMP are made of.

A method says when (`timing`) and how units move (`move`, from the rules in `clicktrain.sparsity.regrowth`).
Between updates masks hold at every step: pruned weights have no gradient, and nothing in the optimizer, so
that no momentum moves them, or starts them off when they grow. The gradient of a pruned weight is read first
where units grow by it. The papers skip the optimizer's step at an update; here it has happened before.

Where layers are to be packed they are so from the first step, or from the update on that leaves enough zeros.
Then nothing outside the masks is stored, no step touches it, and the fast kernels run while positions move;
only a step whose gradients let units grow computes those of all weights.
"""

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayer, PrunableLayers
from clicktrain.methods.base import Action, ApplyMasks, PruningPlan, Record, RunLength, StepInfo
from clicktrain.methods.masks.masked import MaskState, Tensors
from clicktrain.methods.masks.moving_units import MovingUnits
from clicktrain.methods.masks.update_times import Timing
from clicktrain.runs.events import ABSENT, Event, RegrownEvent
from clicktrain.sparsity.pattern_units import PatternUnit
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.regrowth import Units, Update, random_numbers
from clicktrain.sparsity.schedules import ScheduleChoice


@dataclass(frozen=True, kw_only=True)
class Moving(MovingUnits):
    """A method whose units are dropped, and may grow, every `interval` batches."""

    reason: ClassVar[str] = "every filter keeps a weight, kernels are whole"
    moves_last: ClassVar[bool] = False
    """Whether units move once more before the masks are frozen."""
    moves_in: ClassVar[str] = "dynamic"
    """Name of the stage in which units move."""
    usual_interval: ClassVar[tuple[int, int]] = (1000, 50)
    """The interval by default, at the most, and how often units move in a run too short for it."""
    doubling: ClassVar[bool] = False
    """Whether units move half as often in each further quarter of the run."""

    interval: int | None = None
    """Batches between updates; by default 1,000, or a fiftieth of a run of under 50,000 batches."""
    stop: float = 0.75
    """Share of the run after which masks are frozen."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        if self.interval is not None and self.interval < 1:
            raise UserError(f"interval is a number of batches, at least 1, not {self.interval}")
        if not 0 < self.stop <= 1:
            raise UserError(f"stop is a share of the run, above 0 and at most 1, not {self.stop}")

    # ---- what a method says ---------------------------------------------------------------------

    @property
    def begins_at(self) -> float:
        """Share of the run after which units move."""
        return 0.0

    def timing(self, length: RunLength) -> Timing:
        """When units move; UserError if they never would."""
        most, times = self.usual_interval
        interval = max(min(most, length.total // times), 1) if self.interval is None else self.interval
        begin, end = round(self.begins_at * length.total), round(self.stop * length.total)
        if interval >= end - begin:
            since = f", start {self.begins_at:g}" if self.begins_at else ""
            raise UserError(
                f"interval is {interval} but masks are fixed after {end} of {length.total} batches (stop "
                f"{self.stop:g}{since}): they would never change; take a shorter interval or a longer run"
            )
        return Timing(interval, end, length.total, self.doubling, begin)

    @abc.abstractmethod
    def move(self, now: Update) -> tuple[Units, Units]:
        """Drop and grow: the units that stay, and those that live afterwards."""

    @abc.abstractmethod
    def describe(self) -> str:
        """How units move, in words."""

    @property
    def first_sparsity(self) -> float:
        """At the first step; 0 begins dense."""
        return 0.0

    @property
    def decided_by(self) -> str:
        """By what training decides the layers' densities, in words; "" where they are known before."""
        return ""

    @property
    def stages(self) -> tuple[str, ...]:
        """Dense, unless it begins sparse; units move; masks are fixed."""
        return (*(("dense",) if self.first_sparsity == 0 else ()), self.moves_in, "fixed")

    # ---- parts ----------------------------------------------------------------------------------

    @property
    def needs_gradients(self) -> bool:
        """Whether an update reads gradients."""
        return self.reads_gradient

    @property
    def grows_by_gradient(self) -> bool:
        """Whether what grows is chosen by gradients, those of pruned weights too; else at random."""
        return False

    def root_scores(self, layer: PrunableLayer, grad: Tensor | None) -> Tensor:
        """Scores as magnitudes: the root of a criterion, so that w^2 compares units by |w|."""
        return self.scores(layer, grad).sqrt()

    # ---- life cycle -----------------------------------------------------------------------------

    def init(self, prunable: PrunableLayers, length: RunLength) -> MaskState:
        """Check that the run can be done as asked."""
        state = super().init(prunable, length)
        self.timing(length)
        self.check_units(prunable)
        return state

    def at_start(self, state: MaskState, prunable: PrunableLayers, length: RunLength) -> Sequence[Action]:
        """A network that begins sparse is so before its first forward pass."""
        del prunable, length
        if not state.masks:
            return ()
        return [
            self.enter(state, self.moves_in, "sparse from the start"),
            ApplyMasks(state.masks, forget=True),
        ]

    def before_step(self, state: MaskState, prunable: PrunableLayers, step: StepInfo) -> None:
        """Read the gradients of all weights when an update needs them; then pruned weights have none."""
        timing = self.timing(step.length)
        if state.stage == "fixed":
            return
        whole = not self.grows_by_gradient or (
            step.whole_gradients and all(layer.whole_gradient for layer in prunable.layers)
        )
        if self.needs_gradients and self._moves(state, timing, step.seen) and whole:
            self.keep_gradients(state, prunable, step)
        for layer in prunable.layers:
            mask = state.masks.get(layer.name)
            if mask is not None and layer.weight.grad is not None:
                layer.weight.grad.masked_fill_(~mask, 0.0)

    def _moves(self, state: MaskState, timing: Timing, seen: int) -> bool:
        """Whether units move after this many batches."""
        return timing.due(seen, state.updated) or (self.moves_last and seen >= timing.end)

    def wants_gradients(self, state: MaskState, length: RunLength, seen: int) -> bool:
        """At an update that lets units grow where the gradient is large."""
        return (
            self.grows_by_gradient
            and state.stage != "fixed"
            and self._moves(state, self.timing(length), seen)
        )

    def after_packing(self, state: MaskState, names: Collection[str]) -> None:
        """Packed layers hold their masks."""
        state.masks = {name: mask for name, mask in state.masks.items() if name not in names}

    def masks_now(self, state: MaskState, prunable: PrunableLayers) -> Tensors:
        """The masks of all layers, those of packed ones built from their index; none while all is dense."""
        every = ((layer.name, state.masks.get(layer.name), layer) for layer in prunable.layers)
        masks = {name: layer.packed_mask if mask is None else mask for name, mask, layer in every}
        return {name: mask for name, mask in masks.items() if mask is not None}

    def after_step(self, state: MaskState, prunable: PrunableLayers, step: StepInfo) -> Sequence[Action]:
        """Hold the masks; move units when it is time; freeze them after the last time."""
        timing = self.timing(step.length)
        actions: list[Action] = []
        if state.stage == "fixed" or step.seen < timing.begin:
            return ()
        if state.stage == "dense":
            actions.append(self.enter(state, self.moves_in, f"batch {timing.begin} of {timing.total}"))
        if step.seen >= timing.end:
            return [*actions, *self.fix(state, prunable, f"batch {timing.end} of {timing.total}")]
        gradients = state.gradients
        # A step without gradients, skipped for overflow: at the next.
        read = not self.needs_gradients or len(gradients) == len(prunable.layers)
        if not timing.due(step.seen, state.updated) or not read:
            state.gradients = {}
            return [*actions, ApplyMasks(state.masks)] if state.masks else actions
        masks, event = self._update(state, prunable, step.seen, timing.done(step.seen))
        state.masks = {layer.name: masks[layer.name] for layer in prunable.layers if not layer.packed}
        return [*actions, Record(event), ApplyMasks(masks, forget=True)]

    def cut_epoch(self, state: MaskState, length: RunLength, *, latest: bool = False) -> float | None:
        """When units have moved for the last time."""
        del state, latest
        return self.timing(length).end / length.steps_per_epoch

    def event(self, now: Update, kept: Units, alive: Units, threshold: float) -> Event:
        """What to record about a move, with the threshold that units were dropped by."""
        after = now.weights(kept)
        dropped, grown = now.weights(now.alive) - after, now.weights(alive) - after
        return RegrownEvent(dropped=dropped, grown=grown, threshold=threshold)

    def _update(
        self, state: MaskState, prunable: PrunableLayers, seen: int, done: float
    ) -> tuple[Tensors, Event]:
        """Drop and grow: the new masks. Grown weights are zero already: dead ones were."""
        before = self.masks_now(state, prunable)
        weights = {layer.name: self._weights(state, layer) for layer in prunable.layers}
        now = self._now(state, prunable, before, weights, seen, done)
        threshold = state.memory.get("threshold", ABSENT)
        kept, alive = self.move(now)
        masks: Tensors = {}
        changed: int | None = None
        for number, layer in enumerate(prunable.layers):
            name, unit = layer.name, self.unit_at(state, layer)
            if not isinstance(unit, PatternUnit):
                masks[name] = layer.unview(unit.weights(alive[name], layer.view_shape))
                continue
            scores, grads = weights[name]
            if grads is None or not self.grows_by_gradient:
                grads = random_numbers(scores.shape, now.seed, seen, len(prunable.layers) + number)
            old = layer.view(before[name]) if name in before else None
            moved = unit.rearranged(old, kept[name], alive[name], scores, grads, now.rows_of(name))
            masks[name], changed = layer.unview(moved.mask), (changed or 0) + moved.changed
        state.updated, state.gradients = seen, {}
        event = self.event(now, kept, alive, threshold)
        if changed is not None and isinstance(event, RegrownEvent):
            event = replace(event, patterns_changed=changed)
        return masks, event

    def _weights(self, state: MaskState, layer: PrunableLayer) -> tuple[Tensor, Tensor | None]:
        """Scores of weights, and magnitudes of their gradients, as views [F, C, R, S]."""
        grad = state.gradients.get(layer.name)
        scores = layer.view(self.root_scores(layer, grad))
        return scores, None if grad is None else layer.view(grad.float().abs())

    def _now(
        self,
        state: MaskState,
        prunable: PrunableLayers,
        masks: Tensors,
        weights: Mapping[str, tuple[Tensor, Tensor | None]],
        seen: int,
        done: float,
    ) -> Update:
        """What the rules see."""
        alive, scores, gradients = {}, {}, {}
        for layer in prunable.layers:
            name, unit, mask = layer.name, self.unit_at(state, layer), masks.get(layer.name)
            own, grad = weights[name]
            view = None if mask is None else layer.view(mask)
            if view is not None and isinstance(unit, PatternUnit):
                scores[name] = unit.own_scores(own, view)
            else:
                scores[name] = unit.scores(own)
            everywhere = torch.ones_like(scores[name], dtype=torch.bool)
            alive[name] = everywhere if view is None else unit.units(view)
            if grad is not None:
                gradients[name] = unit.scores(grad)
        shapes = {layer.name: layer.shape for layer in prunable.layers}
        sizes = {layer.name: self.unit_of(layer).size(layer.view_shape) for layer in prunable.layers}
        rows = {layer.name: self.rows_of(layer) for layer in prunable.layers}
        return Update(alive, scores, gradients, shapes, sizes, done, state.seed, seen, state.memory, rows)

    def last_masks(self, state: MaskState, prunable: PrunableLayers) -> Tensors:
        """The masks that are frozen, after a last move if there is one."""
        if self.moves_last:
            return self._update(state, prunable, state.updated + 1, 1.0)[0]
        return self.masks_now(state, prunable)

    def budget(self, now: Update) -> int:
        """Weights that live at the sparsity asked for: the same at every time but for parts of units."""
        counts = self.counts_at(now, 1 - self.sparsity)
        return sum(counts[name] * now.sizes[name] for name in counts)

    def counts_at(self, now: Update, density: float) -> dict[str, int]:
        """Units of each layer that live at a density of all layers."""
        return now.counts(self.densities_at(now, density))

    def densities_at(self, now: Update, density: float) -> dict[str, float]:
        """Density of each layer at a density of all layers."""
        return self.spread(now.shapes, {name: now.most(name) for name in now.alive}, density)

    # ---- what is shown --------------------------------------------------------------------------

    def plan(
        self, prunable: PrunableLayers, length: RunLength, state: MaskState | None = None
    ) -> PruningPlan:
        """Per layer: the units, the planned density, or the one reached."""
        rows = self.planned_rows(prunable, state)
        open_yet = bool(self.decided_by) and not (state and state.kept)
        if open_yet:
            first = self.layer_densities(prunable, self.first_sparsity)
            by = f"at the start, then by {self.decided_by}"
            rows = [replace(row, density=None, reason=f"{first[row.name]:.3f} {by}") for row in rows]
        texts = self.stage_texts(length)
        lines = [(f"stage {i} {name}", texts[name]) for i, name in enumerate(self.stages, start=1)]
        return self.show(prunable, state, rows, lines, self.sparsity if open_yet else None)

    def stage_texts(self, length: RunLength) -> dict[str, str]:
        """What happens in each stage, in words."""
        timing = self.timing(length)
        return {
            "dense": f"until batch {timing.begin} of {timing.total}",
            self.moves_in: f"{timing.describe()}, scores by {choice_name(self.criterion)}: {self.describe()}",
            "fixed": "to the end, masks frozen",
        }


@dataclass(frozen=True, kw_only=True)
class Gradual(Moving):
    """A method whose sparsity rises step by step, until masks are frozen."""

    moves_last: ClassVar[bool] = True
    moves_in: ClassVar[str] = "pruning"

    sparsity_schedule: ScheduleChoice = "cubic"
    """How the sparsity rises: s_f + (s_i - s_f) * (1 - t)^3 (the paper's), or another course of (1 - t)^3."""
    start: float = 0.0
    """Share of the run at which pruning begins."""
    stop: float = 0.6
    """Share of the run at which the sparsity asked for is reached and masks are frozen."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        if not 0 <= self.start < self.stop:
            raise UserError(
                f"start is a share of the run, from 0 to below stop ({self.stop:g}), not {self.start}"
            )

    @property
    def begins_at(self) -> float:
        """Share of the run after which units move."""
        return self.start
