"""ADMM: dense weights are pulled towards the nearest that meet the sparsity, then masks are frozen.

An enforcement, as masks while training and the lasso are: it says neither what a unit is nor how many are
kept (`MovingUnits`), nor what matters (the criterion). The run is cut into iterations of equal length. In
each the optimizer, whichever it is, trains on the loss and the pull; between two of them the auxiliary and
dual variables are updated. After the last one the weights are projected for good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.formats.packed import Patterns
from clicktrain.graph.prunable import PrunableLayer, PrunableLayers
from clicktrain.methods.base import Action, PruningPlan, Record, RunLength, StepInfo
from clicktrain.methods.masks.masked import MaskState, Tensors
from clicktrain.methods.masks.moving_units import KERNEL, AnyUnit, MovingUnits
from clicktrain.runs.events import AdmmEvent
from clicktrain.sparsity.admm import Auxiliary, add_pull_, begin, nearest_mask, rescaled, update
from clicktrain.sparsity.importance import CRITERIA, magnitude_importance
from clicktrain.sparsity.pattern_units import PatternUnit
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.schedules import ScheduleChoice, left_at


@dataclass(slots=True)
class ProjectedState(MaskState):
    """The state of ADMM."""

    iteration: int = 0
    """The running one, from 0."""
    auxiliary: dict[str, dict[str, Auxiliary]] = field(default_factory=dict)
    """Z and U, by constraint and layer; empty before the first step and once masks are frozen."""


@dataclass(frozen=True, kw_only=True)
class Projected(MovingUnits):
    """A method that pulls weights towards their projection by ADMM, until masks are frozen."""

    stop: float = 0.5
    """Share of the run in which ADMM pulls the weights; the rest retrains with frozen masks."""
    iterations: int = 6
    """ADMM iterations in that time, of equal length; at most one a batch."""
    rho: float = 0.03
    """Penalty factor of the first iteration: the pull is rho times the distance. Shorter runs need a larger
    one (0.001 to 0.1 is usual in runs of hundreds of epochs)."""
    rho_last: float = 0.3
    """Penalty factor of the last iteration."""
    rho_schedule: ScheduleChoice = "linear"
    """How the logarithm of rho goes from one to the other; linear: by the same factor each time."""
    constraints: Literal["joint", "split"] = "joint"
    """Patterns and kernels as one constraint with one auxiliary variable, or each with its own (PatDNN's)."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        if not 0 < self.stop <= 1:
            raise UserError(f"stop is a share of the run, above 0 and at most 1, not {self.stop}")
        if self.iterations < 1:
            raise UserError(f"iterations must be at least 1, not {self.iterations}")
        for name in ("rho", "rho_last"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.constraints == "split" and self.granularity != "pattern":
            raise UserError(
                "constraints is split, but only granularity pattern has two constraints: leave it at joint"
            )

    # ---- times ----------------------------------------------------------------------------------

    @property
    def stages(self) -> tuple[str, ...]:
        """Weights are pulled; masks are fixed."""
        return ("admm", "fixed")

    def frozen_at(self, length: RunLength) -> int:
        """Batches after which masks are frozen; UserError if there is none."""
        end = round(self.stop * length.total)
        if end < 1:
            raise UserError(
                f"stop is {self.stop:g} of a run of {length.total} batches, which leaves ADMM none: take a "
                "larger share or a longer run"
            )
        return end

    def iterations_in(self, length: RunLength) -> int:
        """ADMM iterations of a run."""
        return min(self.iterations, self.frozen_at(length))

    def iteration_at(self, seen: int, length: RunLength) -> int:
        """The iteration, from 0, of the step that follows ``seen`` batches."""
        return seen * self.iterations_in(length) // self.frozen_at(length)

    def rho_at(self, iteration: int, length: RunLength) -> float:
        """The penalty factor of an iteration."""
        done = iteration / max(self.iterations_in(length) - 1, 1)
        return float(self.rho_last * (self.rho / self.rho_last) ** left_at(self.rho_schedule, done))

    def cut_epoch(self, state: MaskState, length: RunLength, *, latest: bool = False) -> float | None:
        """When ADMM ends."""
        del state, latest
        return self.frozen_at(length) / length.steps_per_epoch

    # ---- projection -----------------------------------------------------------------------------

    def units_of(self, state: MaskState, layer: PrunableLayer, count: int) -> dict[str, tuple[AnyUnit, int]]:
        """Constraint -> its unit and how many of the layer are not zero."""
        unit = self.unit_at(state, layer)
        if self.constraints == "joint" or not isinstance(unit, PatternUnit):
            return {"units": (unit, count)}
        return {"patterns": (unit, math.prod(unit.shape(layer.view_shape))), "kernels": (KERNEL, count)}

    def nearest(
        self,
        state: MaskState,
        layer: PrunableLayer,
        values: Tensor,
        unit: AnyUnit,
        count: int,
    ) -> Tensor:
        """Mask of the projection of a layer's values, all of the weight's shape.

        Criteria other than the magnitude choose what matters most to them instead of what is nearest.
        """
        grad, criterion = state.gradients.get(layer.name), CRITERIA.resolve(self.criterion)
        if grad is None and self.reads_gradient:
            criterion = magnitude_importance  # before the first step there is none
        values = values.detach().float()
        scores = layer.view(criterion(values, values if grad is None else grad.float()))
        return layer.unview(nearest_mask(scores, unit, count, self.rows_of(layer)))

    # ---- life cycle -----------------------------------------------------------------------------

    def new_state(self) -> ProjectedState:
        """A state before the first step."""
        return ProjectedState(stage="admm")

    def init(self, prunable: PrunableLayers, length: RunLength) -> MaskState:
        """Check that the run can be done as asked."""
        self.frozen_at(length)
        state = super().init(prunable, length)
        self.check_units(prunable)
        return state

    def mask_patterns(self, state: MaskState, layer: PrunableLayer) -> Patterns | None:
        """Layers are dense until masks are frozen."""
        del state, layer
        return None

    def at_start(self, state: MaskState, prunable: PrunableLayers, length: RunLength) -> Sequence[Action]:
        """The first Z is the projection of the weights as they are, U is zero."""
        assert isinstance(state, ProjectedState)
        counts = self.layer_counts(prunable, self.sparsity)
        for layer in prunable.layers:
            weight = layer.weight.detach()
            for name, (unit, count) in self.units_of(state, layer, counts[layer.name]).items():
                mask = self.nearest(state, layer, weight, unit, count)
                state.auxiliary.setdefault(name, {})[layer.name] = begin(weight, mask)
        return [self.enter(state, "admm", f"{self.iterations_in(length)} iterations begin")]

    def before_step(self, state: MaskState, prunable: PrunableLayers, step: StepInfo) -> None:
        """Add the pull to the gradients; keep these first where the projection reads them."""
        assert isinstance(state, ProjectedState)
        if state.stage == "fixed":
            return
        if self.reads_gradient and self.iteration_at(step.seen, step.length) > state.iteration:
            self.keep_gradients(state, prunable, step)
        rho: float | Tensor = self.rho_at(state.iteration, step.length)
        if step.grad_scale is not None:
            rho = step.grad_scale * rho
        for layer in prunable.layers:
            grad = layer.weight.grad
            for layers in state.auxiliary.values():
                if grad is not None and layer.name in layers:
                    add_pull_(grad, layer.weight, layers[layer.name], rho)

    def after_step(self, state: MaskState, prunable: PrunableLayers, step: StepInfo) -> Sequence[Action]:
        """Update Z and U at the end of an iteration; after the last one freeze the masks."""
        assert isinstance(state, ProjectedState)
        end = self.frozen_at(step.length)
        if state.stage == "fixed":
            return ()
        following = self.iteration_at(step.seen, step.length)
        if following <= state.iteration or (self.reads_gradient and not state.gradients):
            return ()  # without gradients, of a step that was skipped for overflow: after the next
        if step.seen >= end:
            return self.fix(state, prunable, f"batch {end} of {step.length.total}{self._far(state)}")
        return [Record(self._update(state, prunable, following, step.length))]

    def _far(self, state: ProjectedState) -> str:
        """What to say where ADMM has not brought weights nearer to what they are pulled to."""
        first, last = (state.memory.get(key, 0.0) for key in ("first residual", "residual"))
        if last < first or state.iteration < 2:
            return ""
        return (
            f"; the weights did not come nearer to their projections (from {first:.0%} of their norm to "
            f"{last:.0%}): take a larger rho or a longer run"
        )

    def _update(
        self, state: ProjectedState, prunable: PrunableLayers, following: int, length: RunLength
    ) -> AdmmEvent:
        """The updates of Z and U between two iterations; what to record."""
        rho, before = self.rho_at(following, length), self.rho_at(state.iteration, length)
        counts = self.layer_counts(prunable, self.sparsity)
        far = moved = whole = 0.0
        for layer in prunable.layers:
            weight = layer.weight.detach()
            for name, (unit, count) in self.units_of(state, layer, counts[layer.name]).items():
                old = state.auxiliary[name][layer.name]
                new = update(weight, old, self.nearest(state, layer, weight + old.dual, unit, count))
                state.auxiliary[name][layer.name] = rescaled(new, before, rho)
                far += _square(weight - new.target)
                moved += _square(new.target - old.target)
                whole += _square(weight)
        state.iteration, state.gradients = following, {}
        scale = math.sqrt(whole) or 1.0
        residual = state.memory["residual"] = math.sqrt(far) / scale
        state.memory.setdefault("first residual", residual)
        return AdmmEvent(
            iteration=following + 1,
            iterations=self.iterations_in(length),
            rho=rho,
            residual=residual,
            moved=math.sqrt(moved) / scale,
        )

    def last_masks(self, state: MaskState, prunable: PrunableLayers) -> Tensors:
        """The projection of the weights themselves, onto all constraints at once."""
        counts = self.layer_counts(prunable, self.sparsity)
        return {
            layer.name: self.nearest(
                state, layer, layer.weight, self.unit_at(state, layer), counts[layer.name]
            )
            for layer in prunable.layers
        }

    def after_freeze(self, state: MaskState, masks: Mapping[str, Tensor]) -> None:
        """Release Z and U."""
        assert isinstance(state, ProjectedState)
        super().after_freeze(state, masks)
        state.auxiliary = {}

    # ---- what is shown --------------------------------------------------------------------------

    def plan(
        self, prunable: PrunableLayers, length: RunLength, state: MaskState | None = None
    ) -> PruningPlan:
        """Per layer: the units and their planned density, or the one reached."""
        iterations, end = self.iterations_in(length), self.frozen_at(length)
        rise = f"rho {self.rho_at(0, length):g} to {self.rho_at(iterations - 1, length):g}"
        if self.rho != self.rho_last:
            rise += f" by a {choice_name(self.rho_schedule)} schedule of its logarithm"
        each = "Z and U each for patterns and kernels" if self.constraints == "split" else "one Z and U"
        pulled = f"until batch {end} of {length.total}: {iterations} iterations, {rise}, {each}"
        by = f"projected by {choice_name(self.criterion)}"
        stages = [("stage 1 admm", f"{pulled}, {by}"), ("stage 2 fixed", "to the end, masks frozen")]
        return self.show(prunable, state, self.planned_rows(prunable, state), stages)


def _square(tensor: Tensor) -> float:
    return float(tensor.square().sum(dtype=torch.float64))
