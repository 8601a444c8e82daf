"""Units that are dropped and grow at times during a run: what RigL, DSR, GraNet, MEST and GMP are made of.

A method says when (`timing`) and how units move (`move`, from the rules in `clicktrain.sparsity.regrowth`).
Between updates masks hold at every step: pruned weights have no gradient, and nothing in the optimizer, so
that no momentum moves them, or starts them off when they grow. The gradient of a pruned weight is read first
where units grow by it. The papers skip the optimizer's step at an update; here it has happened before.

Until masks are frozen a run is charged the dense cost in `clicktrain.train.prepare`, although most weights
are zero: no operator makes use of positions that still change.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clicktrain.comm.agreement import agreed_text
from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayer, PrunableLayers
from clicktrain.methods.base import Action, ApplyMasks, LayerPlan, PruningPlan, Record, RunLength, StepInfo
from clicktrain.methods.masks.masked import Masked, MaskState, Tensors
from clicktrain.methods.masks.update_times import Timing
from clicktrain.runs.events import ABSENT, Event, RegrownEvent
from clicktrain.sparsity.distributions import DISTRIBUTIONS, DistributionChoice
from clicktrain.sparsity.importance import reads_gradient
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.regrowth import GROWTHS, GrowthChoice, Units, Update, random_units, units_at
from clicktrain.sparsity.schedules import ScheduleChoice
from clicktrain.sparsity.units import UNITS, Unit, UnitChoice


@dataclass(frozen=True, kw_only=True)
class Moving(Masked):
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

    granularity: UnitChoice = "weight"
    """What is dropped and grown: single weights, or whole kernels."""
    densities: DistributionChoice = "erk"
    """Weights over layers: Erdos-Renyi-kernel (small layers denser), or the same share everywhere."""
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
    def unit(self) -> str:
        """What has to have a meaning in a layer for it to be pruned."""
        return choice_name(self.granularity).rpartition(":")[2]

    @property
    def kind(self) -> Unit:
        """The unit."""
        return UNITS.resolve(self.granularity)

    @property
    def needs_gradients(self) -> bool:
        """Whether an update reads gradients."""
        return self.reads_gradient

    def layer_densities(self, prunable: PrunableLayers, sparsity: float) -> dict[str, float]:
        """Share of each layer's weights that lives at a sparsity of all layers."""
        shapes = {layer.name: layer.shape for layer in prunable.layers}
        return DISTRIBUTIONS.resolve(self.densities)(shapes, 1 - sparsity)

    def root_scores(self, layer: PrunableLayer, grad: Tensor | None) -> Tensor:
        """Scores as magnitudes: the root of a criterion, so that w^2 compares units by |w|."""
        return self.scores(layer, grad).sqrt()

    # ---- life cycle -----------------------------------------------------------------------------

    def init(self, prunable: PrunableLayers, length: RunLength) -> MaskState:
        """Check that the run can be done as asked."""
        state = super().init(prunable, length)
        self.timing(length)
        self._check_units(prunable)
        return state

    def _check_units(self, prunable: PrunableLayers) -> None:
        """UserError where fewer units would live than there are filters."""
        units = sum(math.prod(self.kind.shape(layer.view_shape)) for layer in prunable.layers)
        filters = sum(layer.view_shape[0] for layer in prunable.layers)
        if (1 - self.sparsity) * units < filters:
            most = math.floor(1000 * (1 - filters / units)) / 1000
            raise UserError(
                f"a sparsity of {self.sparsity:g} leaves {(1 - self.sparsity) * units:.0f} "
                f"{self.unit}s to {filters} filters: at most {most:g} can be asked of this network"
            )

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
        moves = timing.due(step.seen, state.updated) or (self.moves_last and step.seen >= timing.end)
        if self.needs_gradients and moves:
            self.keep_gradients(state, prunable, step)
        for layer in prunable.layers:
            mask = state.masks.get(layer.name)
            if mask is not None and layer.weight.grad is not None:
                layer.weight.grad.masked_fill_(~mask, 0.0)

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
        event = self._update(state, prunable, step.seen, timing.done(step.seen))
        return [*actions, Record(event), ApplyMasks(state.masks, forget=True)]

    def cut_epoch(self, state: MaskState, length: RunLength, *, latest: bool = False) -> float | None:
        """When units have moved for the last time."""
        del state, latest
        return self.timing(length).end / length.steps_per_epoch

    def event(self, now: Update, kept: Units, alive: Units, threshold: float) -> Event:
        """What to record about a move, with the threshold that units were dropped by."""
        after = now.weights(kept)
        dropped, grown = now.weights(now.alive) - after, now.weights(alive) - after
        return RegrownEvent(dropped=dropped, grown=grown, threshold=threshold)

    def _update(self, state: MaskState, prunable: PrunableLayers, seen: int, done: float) -> Event:
        """Drop and grow. Grown weights are zero already: dead ones were."""
        now = self._now(state, prunable, seen, done)
        threshold = state.memory.get("threshold", ABSENT)
        kept, alive = self.move(now)
        for layer in prunable.layers:
            state.masks[layer.name] = layer.unview(self.kind.weights(alive[layer.name], layer.view_shape))
        state.updated, state.gradients = seen, {}
        return self.event(now, kept, alive, threshold)

    def _now(self, state: MaskState, prunable: PrunableLayers, seen: int, done: float) -> Update:
        """What the rules see."""
        unit = self.kind
        alive, scores, gradients = {}, {}, {}
        for layer in prunable.layers:
            name, grad, mask = layer.name, state.gradients.get(layer.name), state.masks.get(layer.name)
            scores[name] = unit.scores(layer.view(self.root_scores(layer, grad)))
            everywhere = torch.ones_like(scores[name], dtype=torch.bool)
            alive[name] = everywhere if mask is None else unit.units(layer.view(mask))
            if grad is not None:
                gradients[name] = unit.scores(layer.view(grad.float().abs()))
        shapes = {layer.name: layer.shape for layer in prunable.layers}
        sizes = {layer.name: unit.size(layer.view_shape) for layer in prunable.layers}
        return Update(alive, scores, gradients, shapes, sizes, done, state.seed, seen, state.memory)

    def last_masks(self, state: MaskState, prunable: PrunableLayers) -> Tensors:
        """The masks that are frozen, after a last move if there is one."""
        if self.moves_last:
            self._update(state, prunable, state.updated + 1, 1.0)
        return state.masks

    def budget(self, now: Update) -> int:
        """Weights that live at the sparsity asked for: the same at every time but for parts of units."""
        densities = DISTRIBUTIONS.resolve(self.densities)(now.shapes, 1 - self.sparsity)
        return sum(units_at(densities[n], now.alive[n].numel()) * now.sizes[n] for n in now.alive)

    # ---- what is shown --------------------------------------------------------------------------

    def plan(
        self, prunable: PrunableLayers, length: RunLength, state: MaskState | None = None
    ) -> PruningPlan:
        """Per layer: the units, the planned density, or the one reached."""
        rows = []
        planned = self.layer_densities(prunable, self.sparsity)
        first = self.layer_densities(prunable, self.first_sparsity)
        open_yet = bool(self.decided_by) and not (state and state.kept)
        for layer in prunable.layers:
            name, units = layer.name, math.prod(self.kind.shape(layer.view_shape))
            density = units_at(planned[name], units) / units
            what = "weights" if layer.kind == "linear" else f"{self.unit}s"
            why = "dense by Erdos-Renyi" if density == 1 and not (state and state.kept) else ""
            if open_yet:
                why = f"{first[name]:.3f} at the start, then by {self.decided_by}"
            rows.append(LayerPlan(name, layer.shape, what, None if open_yet else density, None, why))
        timing = self.timing(length)
        texts = {
            "dense": f"until batch {timing.begin} of {timing.total}",
            self.moves_in: f"{timing.describe()}, scores by {choice_name(self.criterion)}: {self.describe()}",
            "fixed": "to the end, masks frozen",
        }
        lines = [(f"stage {i} {name}", texts[name]) for i, name in enumerate(self.stages, start=1)]
        return self.show(prunable, state, rows, lines, self.sparsity if open_yet else None)


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


@dataclass(frozen=True, kw_only=True)
class Growing(Moving):
    """A method whose units also grow, most often sparse from the first step, at random positions."""

    growth: GrowthChoice = "gradient"
    """Where units grow inside a layer: at the largest gradients, or at random positions."""
    mask_seed: int | None = None
    """Seed of the random positions; the run's own by default."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        if self.mask_seed is not None and self.mask_seed < 0:
            raise UserError(f"mask_seed must be at least 0, not {self.mask_seed}")

    @property
    def first_sparsity(self) -> float:
        """Sparse from the first step."""
        return self.sparsity

    @property
    def needs_gradients(self) -> bool:
        """Whether an update reads gradients."""
        return super().needs_gradients or reads_gradient(GROWTHS.resolve(self.growth))

    def grow(self, now: Update, kept: Units, counts: Mapping[str, int]) -> Units:
        """The units that live once these counts have grown in each layer."""
        return GROWTHS.resolve(self.growth)(now, kept, counts) if any(counts.values()) else kept

    @property
    def grown(self) -> str:
        """Where units grow, in words."""
        name = choice_name(self.growth)
        return {"gradient": "the largest gradients", "random": "random positions"}.get(name, name)

    def init(self, prunable: PrunableLayers, length: RunLength) -> MaskState:
        """Random positions, from the seed or else from PyTorch's (which is only read); none if dense."""
        state = super().init(prunable, length)
        seed = torch.initial_seed() if self.mask_seed is None else self.mask_seed
        state.seed = int(agreed_text(str(seed), prunable.layers[0].weight.device))
        if self.first_sparsity == 0:
            return state
        state.stage = self.moves_in
        densities = self.layer_densities(prunable, self.first_sparsity)
        for number, layer in enumerate(prunable.layers):
            shape = self.kind.shape(layer.view_shape)
            units = random_units(shape, densities[layer.name], state.seed, number).to(layer.weight.device)
            state.masks[layer.name] = layer.unview(self.kind.weights(units, layer.view_shape))
        return state
