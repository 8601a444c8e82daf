"""PruneTrain: a group lasso over channels, and a network that becomes smaller while it trains (section 4).

Every step adds the lasso's gradient, or shrinks channels by it (`sparsity.channel_lasso`). Every ``interval``
epochs channels under the threshold are set to zero, and those that are zero on both sides, or that no layer
reads, are removed, with layers of residual branches that have become zero (`surgery.plan_from_zeros`). The
paper's own comparisons are the same composition with another rhythm: one reconfiguration at a given epoch
(Alvarez and Salzmann), none before the end (SSL).

Where no penalty is given, a run has a target, the share of FLOPs or parameters that is to be left, and the
coefficient is steered towards it (`target_steering`); that is not in the paper. The paper trains with SGD;
with any other optimizer the shrinkage is scaled by how far its steps move the weights (`measured_step`).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.graph import as_inputs
from clicktrain.graph.batch import first_tensor
from clicktrain.graph.prunable import PrunableLayers, SeenBatch, check_convolutions, find_prunable, matches
from clicktrain.latency.channel_multiple import MULTIPLES, BatchForm, fastest_multiple
from clicktrain.methods.base import (
    Action,
    LayerPlan,
    Method,
    PruningPlan,
    Reconfigure,
    Record,
    RunLength,
    StepInfo,
    plan_rows,
)
from clicktrain.methods.channels.axes import channel_axes, why_fixed
from clicktrain.methods.channels.costs import Cost
from clicktrain.methods.channels.steering import (
    TargetState,
    held_indices,
    plan_within,
    steered_coefficient,
    sum_of_squares,
)
from clicktrain.methods.channels.target import NEAR, WORDS, ChannelTarget, original_widths
from clicktrain.methods.outcome import NOTED, Reached, Target
from clicktrain.sparsity.channel_lasso import (
    ChannelAxis,
    add_channel_lasso_gradient_,
    channel_penalty,
    coefficient_for_ratio,
    measured_step,
    shrink_channels_,
    without_channels,
    zero_small_channels_,
)
from clicktrain.surgery import SurgeryPlan, plans_from_zeros
from clicktrain.surgery.agreed_plans import agreed_plans

Axes = dict[str, tuple[ChannelAxis, ...]]
Scheme = Literal["union", "gating"]


PRESETS: dict[str, dict[str, Any]] = {
    "default": {"update": "proximal", "sides": "readers", "floor": 0.1},
    "paper": {"update": "gradient", "sides": "both", "floor": 0.0},
}
TARGET_FLOPS = 0.6
"""The target where neither a target nor a penalty is given."""
PENALTY_RATIO = 0.25
"""The strongest of the paper's (5.1); with a target, where steering starts."""
TARGET_AT = 0.75
"""Share of the run after which the target is met."""


@dataclass(slots=True)
class PruneTrainState:
    """What PruneTrain remembers between steps. ``axes`` follow from the network and are not saved."""

    stage: str = "sparsify"
    coefficient: float | None = None
    reconfigured: float = 0.0
    """Epoch of the last reconfiguration."""
    done: bool = False
    round_to: int | None = None
    """Multiple of the widths at the last reconfiguration; None while there was nothing to choose."""
    batch: BatchForm | None = None
    """Of the last training batch, where widths are chosen by timing."""
    target: TargetState = field(default_factory=TargetState)
    axes: Axes | None = field(default=None, compare=False)
    shrunk: Axes | None = field(default=None, compare=False)
    """``axes`` without the channels that are held."""
    view: ChannelTarget | None = field(default=None, compare=False)
    before: tuple[list[Tensor], Tensor] | None = field(default=None, compare=False)
    """Inside a step: the weights, and the sum of their squared gradients; of adaptive optimizers."""


@dataclass(frozen=True, kw_only=True)
class PruneTrain(Method[PruneTrainState]):
    """Channels and layers are removed while the network trains (PruneTrain, 2019)."""

    name: ClassVar[str] = "prunetrain"
    title: ClassVar[str] = "PruneTrain"
    reads_graph: ClassVar[bool] = True

    preset: Literal["default", "paper"] = "default"
    """Where settings that are not given come from: what works in short runs, with a target, or the paper,
    with a penalty alone."""
    target_flops: float | None = None
    """Share of the inference FLOPs that is to be left; the lasso is steered towards it. 0.6 by default,
    unless target_parameters, penalty_ratio, coefficient or the paper's preset is given."""
    target_parameters: float | None = None
    """Share of the parameters that is to be left, instead."""
    target_at: float | None = None
    """Epoch at whose end the target is met, what is missing by the smallest norms; 3/4 of the run by
    default."""
    floor: float | None = None
    """Share of each layer's channels that stays, one at least; 0.1 by default (paper: 0). They are not
    penalised. Without a target, layers of residual branches keep none, so that whole branches can go."""
    penalty_ratio: float | None = None
    """Share of the whole loss that the lasso has at the first step, 0.25 by default; sets its coefficient
    (the paper's 0.2 to 0.25 prune in runs of 182 epochs). With a target, where steering starts."""
    coefficient: float | None = None
    """Coefficient of the lasso itself, instead of the penalty ratio."""
    update: Literal["proximal", "gradient"] | None = None
    """How the lasso acts: shrink channels after each step, to exactly zero; or add its gradient (the paper's,
    which needs a long run to come under the threshold)."""
    reconfigure: Literal["interval", "once", "end"] = "interval"
    """When channels are removed: every interval (PruneTrain), once (Alvarez and Salzmann), or only at the end
    of the run (SSL)."""
    interval: float | None = None
    """Epochs between reconfigurations; 1/18 of the run by default, as the paper's 10 of 182 and 5 of 90."""
    once_at: float | None = None
    """Epoch of the only reconfiguration (reconfigure: once); half of the run by default."""
    scheme: Literal["union", "gating"] = "union"
    """How the layers of a residual stage agree: keep what one of them needs, or select and scatter channels
    around each branch."""
    sides: Literal["both", "readers"] | None = None
    """A channel goes when no layer reads it, or only if it is zero on both sides, as in the paper. Neither
    changes what the network computes; the latter comes later."""
    threshold: float = 1e-4
    """Channels whose weights are all at most this large are set to zero."""
    round_to: int | Literal["auto"] = 1
    """Widths that remain are multiples of it, where the layer is wide enough; auto: the multiple with which
    the network that is left trains fastest on this device, measured at each reconfiguration."""
    fine_tune: float = 0.0
    """Epochs without the lasso at the end of the run."""
    linear: bool = True
    """Penalise the input channels of fully connected layers too."""
    check_outputs: bool = False
    """At every reconfiguration, measure how much the network's output changes on the last batch."""
    exclude: tuple[str, ...] = ()
    """Layers without penalty, by module path (shell-style)."""

    def __post_init__(self) -> None:
        """Fill in the preset and check every setting."""
        if self.preset not in PRESETS:
            raise UserError(f"preset must be one of {', '.join(PRESETS)}, not {self.preset!r}")
        self._fill_in_target()
        for key, value in PRESETS[self.preset].items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        super().__post_init__()
        for key in ("penalty_ratio", "floor"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"{key} must be at least 0 and below 1, not {getattr(self, key)}")
        for key in ("target_flops", "target_parameters"):
            value = getattr(self, key)
            if value is not None and not 0 < value < 1:
                raise UserError(
                    f"{key} is the share that is left, between 0 and 1 (0.6 saves 40%), not {value}"
                )
        if self.target_flops is not None and self.target_parameters is not None:
            raise UserError("target_flops and target_parameters are both set: give one")
        if self.target_at is not None and self.target is None:
            raise UserError(
                "target_at is set but there is no target: set target_flops or target_parameters too"
            )
        for key in ("coefficient", "interval", "once_at", "target_at"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{key} must be above 0, not {value}")
        for key in ("threshold", "fine_tune"):
            if not 0 <= getattr(self, key) < math.inf:
                raise UserError(f"{key} must not be negative, not {getattr(self, key)}")
        if self.round_to != "auto" and self.round_to < 1:
            raise UserError(f"round_to must be at least 1, or auto, not {self.round_to}")
        if self.once_at is not None and self.reconfigure != "once":
            raise UserError("once_at is set but reconfigure is not 'once': set that too")

    def _fill_in_target(self) -> None:
        """The default target, for runs that name neither a target nor a penalty; the penalty's default."""
        given = (self.target_flops, self.target_parameters, self.penalty_ratio, self.coefficient)
        if self.preset == "default" and all(value is None for value in given):
            object.__setattr__(self, "target_flops", TARGET_FLOPS)
        if self.penalty_ratio is None:
            object.__setattr__(self, "penalty_ratio", PENALTY_RATIO)

    @property
    def target(self) -> tuple[Cost, float] | None:
        """What is to be left, and which share of it; None where the penalty is fixed."""
        if self.target_flops is not None:
            return "flops", self.target_flops
        return None if self.target_parameters is None else ("parameters", self.target_parameters)

    def target_epoch(self, length: RunLength) -> int:
        """Finished epochs when the target is met; those of the run: at its end."""
        if self.reconfigure == "end":
            return length.epochs
        if self.reconfigure == "once":
            return max(1, math.floor(self._once(length)))
        at = TARGET_AT * length.epochs if self.target_at is None else self.target_at
        return max(1, math.floor(min(at, length.epochs - self.fine_tune)))

    def _once(self, length: RunLength) -> float:
        return self.once_at if self.once_at is not None else length.epochs / 2

    @property
    def keeps_inputs(self) -> bool:
        """For ``check_outputs``, and to time steps on (``round_to: auto``)."""
        return self.check_outputs or self.round_to == "auto"

    @property
    def _given(self) -> int:
        return 1 if self.round_to == "auto" else self.round_to

    # ---- what and when ----------------------------------------------------------------------

    def find_prunable(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> PrunableLayers:
        """Every convolution, the first and depthwise ones too, and fully connected layers."""
        return find_prunable(model, trained, exclude=self.exclude, include=("*",), linear=True)

    def interval_of(self, length: RunLength) -> float:
        """Epochs between two reconfigurations."""
        return self.interval or float(max(1, round(length.epochs / 18)))

    def init(self, prunable: PrunableLayers, length: RunLength) -> PruneTrainState:
        """Check that the run can be done as asked."""
        check_convolutions(prunable, "PruneTrain")
        if self.once_at is not None and self.once_at > length.epochs:
            raise UserError(f"once_at is {self.once_at:g} but the run has {length.epochs} epochs")
        if self.fine_tune >= length.epochs:
            raise UserError(
                f"fine_tune is {self.fine_tune:g} epochs: leave some of the {length.epochs} to the lasso"
            )
        if self.target_at is not None and self.target_at > length.epochs:
            raise UserError(f"target_at is {self.target_at:g} but the run has {length.epochs} epochs")
        state = PruneTrainState(round_to=None if self.round_to == "auto" else self.round_to)
        if prunable.example is not None:
            self._look(state, prunable)
        return state

    def _look(self, state: PruneTrainState, prunable: PrunableLayers) -> None:
        """At the network as it is; the first time, whether the target can be reached.

        Raises:
            UserError: it cannot, or no channel can go.
        """
        state.axes = state.shrunk = self._axes(prunable)
        state.view = None
        view = self._view(state, prunable)
        if view is None:
            return
        if state.target.dense is None:
            if self.target is not None:
                view.check_reachable(f"target_{view.what}", self.floor or 0.0)
            state.target.dense = view.dense
            state.target.widths = original_widths(view.groups)
        if not state.target.held:
            state.target.held = view.held(view.norms())
        self._hold(state, view)

    def _view(self, state: PruneTrainState, prunable: PrunableLayers) -> ChannelTarget | None:
        """What may go of the network as it is; None if there is neither a target nor a floor."""
        if self.target is None and not self.floor:
            return None
        if state.view is None:
            assert prunable.model is not None
            assert prunable.example is not None
            what, share = self.target or ("flops", 0.0)
            state.view = ChannelTarget(
                prunable.model,
                prunable.example,
                what,
                share,
                penalised=state.axes or (),
                both_sides=self.sides == "both",
                floor=self.floor or 0.0,
                branches=self.target is not None,
                dense=state.target.dense,
                widths=state.target.widths or None,
            )
        return state.view

    def _hold(self, state: PruneTrainState, target: ChannelTarget) -> None:
        """Leave out of the lasso what every layer keeps."""
        indices = held_indices(target, state.target.held)
        state.shrunk = {
            name: without_channels(own, indices.get(name, {})) for name, own in (state.axes or {}).items()
        }

    def _axes(self, prunable: PrunableLayers) -> Axes:
        assert prunable.model is not None
        assert prunable.example is not None
        names = [layer.name for layer in prunable.convs if not matches(layer.name, self.exclude)]
        if self.linear:
            names += [layer.name for layer in prunable.linears if not matches(layer.name, self.exclude)]
        axes = channel_axes(prunable.model, prunable.example, names)
        if not axes:
            why = why_fixed(prunable.model, prunable.example)
            raise UserError(f"no channel of this network can be removed ({why or 'it has no layers'})")
        return axes

    def _weights(self, prunable: PrunableLayers, axes: Axes) -> list[tuple[Tensor, tuple[ChannelAxis, ...]]]:
        return [(layer.weight, axes[layer.name]) for layer in prunable.layers if layer.name in axes]

    def stage(self, state: PruneTrainState) -> str:
        """sparsify, or fine-tune without the lasso."""
        return state.stage

    # ---- steps ------------------------------------------------------------------------------

    def before_step(self, state: PruneTrainState, prunable: PrunableLayers, step: StepInfo) -> None:
        """Set the coefficient, at the first step by Eq. (3); add the lasso's gradient."""
        if state.axes is None:
            self._look(state, prunable)
        if state.stage != "sparsify":
            return
        if state.coefficient is None:
            weights = self._weights(prunable, state.axes or {})
            penalty = float(torch.stack([channel_penalty(w.float(), a) for w, a in weights]).sum())
            state.coefficient = self.coefficient or coefficient_for_ratio(
                self.penalty_ratio or 0.0, float(step.loss), penalty
            )
        self._steer(state, prunable, step)
        weights = self._weights(prunable, state.shrunk or {})
        if self.update == "proximal":
            if step.adaptive and not state.target.steered:
                gradients = [step.gradient(weight) for weight, _ in weights]
                square = sum_of_squares([g for g in gradients if g is not None] or [step.loss.new_zeros(1)])
                state.before = [weight.detach().clone() for weight, _ in weights], square
            return
        strength: float | Tensor = state.coefficient
        if step.grad_scale is not None:
            strength = step.grad_scale * strength
        for weight, axes in weights:
            if weight.grad is not None:
                add_channel_lasso_gradient_(weight.grad, weight.detach(), axes, strength)

    def _steer(self, state: PruneTrainState, prunable: PrunableLayers, step: StepInfo) -> None:
        """Set the coefficient for an epoch that begins; without a target, only what the lasso leaves out."""
        target, course = self._view(state, prunable), state.target
        if target is None:
            return
        if self.target is None:
            if course.held_for < step.epoch:
                course.held_for, course.held = step.epoch, target.held(target.norms())
                self._hold(state, target)
            return
        if course.steered < step.epoch:
            course.steered = step.epoch
            last = self.target_epoch(step.length)
            state.coefficient = steered_coefficient(
                target, course, state.coefficient or 0.0, step.epoch, last
            )
            self._hold(state, target)
        course.steps, course.rates = course.steps + 1, course.rates + step.learning_rate

    def _shrink(self, state: PruneTrainState, prunable: PrunableLayers, step: StepInfo) -> None:
        """The proximal step; of an adaptive optimizer by what its step was, until the lasso is steered."""
        if state.stage != "sparsify" or state.coefficient is None:
            return
        weights, reach = self._weights(prunable, state.shrunk or {}), torch.tensor(step.learning_rate)
        before, state.before = state.before, None
        if step.adaptive and not state.target.steered:
            if before is None:
                return  # a step that was skipped for overflow
            moved = sum_of_squares([w - old for (w, _), old in zip(weights, before[0], strict=True)])
            channels = sum(axis.count for _, axes in weights for axis in axes)
            reach = measured_step(moved, before[1], state.coefficient, channels)
        for weight, axes in weights:
            shrink_channels_(weight, axes, state.coefficient * reach.to(weight.device))

    def after_step(
        self, state: PruneTrainState, prunable: PrunableLayers, step: StepInfo
    ) -> Sequence[Action]:
        """Shrink; reconfigure at the end of an epoch, when it is time; no lasso in the last epochs."""
        if self.update == "proximal":
            self._shrink(state, prunable, step)
        if not step.ends_epoch:
            return ()
        if self.round_to == "auto" and prunable.seen is not None:
            state.batch = BatchForm.of(prunable.seen)
        epoch = math.floor(step.position)
        actions: list[Action] = []
        if state.reconfigured == 0 and step.epoch == 0 and state.coefficient is not None:
            share = self.penalty_ratio if self.coefficient is None else None
            event = {"event": "penalty", "coefficient": state.coefficient, "penalty_ratio": share}
            actions.append(Record(event))
        last = epoch >= step.length.epochs
        final = self.target is not None and epoch >= self.target_epoch(step.length)
        if not last and (self._due(state, epoch, step.length) or (final and not state.target.met)):
            actions += self.reconfigure_now(state, prunable, epoch, final=final)
        if state.stage == "sparsify":
            reason = f"epoch {epoch} begins"
            if state.target.met:
                reason = f"{state.target.share:.3f} of the {self._what} are left"
            elif not (self.fine_tune and epoch >= step.length.epochs - self.fine_tune):
                return actions
            state.stage = "fine-tune"
            event = {"event": "stage", "stage": state.stage, "number": 2, "reason": reason}
            actions.append(Record(event))
        return actions

    @property
    def _what(self) -> str:
        return "" if self.target is None else WORDS[self.target[0]]

    def _due(self, state: PruneTrainState, epoch: int, length: RunLength) -> bool:
        if self.reconfigure == "interval":
            return epoch - state.reconfigured >= self.interval_of(length)
        return self.reconfigure == "once" and not state.done and epoch >= self._once(length)

    def reconfigure_now(
        self, state: PruneTrainState, prunable: PrunableLayers, epoch: float, *, final: bool = False
    ) -> list[Action]:
        """4.1, 4.2: zero what is under the threshold, remove what is zero on both sides.

        ``final``: and what the target lacks, by the smallest norms.
        """
        started = time.perf_counter()
        assert prunable.model is not None
        state.reconfigured, state.done = epoch, True
        axes = state.axes or self._axes(prunable)
        zeroed = sum(zero_small_channels_(w, a, self.threshold) for w, a in self._weights(prunable, axes))
        actions: list[Action] = []
        candidates = MULTIPLES if self.round_to == "auto" else sorted({1, self.round_to})
        plans = agreed_plans(self._plans(prunable, candidates), prunable.layers[0].weight.device)
        multiple = self._given
        if self.round_to == "auto":
            choice = fastest_multiple(prunable.model, self._seen(state, prunable), plans)
            if choice is not None:
                state.round_to = choice.chosen
                actions.append(Record({"event": "widths", **choice.to_json()}))
            multiple = state.round_to or 1
        plan, event = plans[multiple], {}
        target = None if self.target is None else self._view(state, prunable)
        if target is not None:
            plan = self._within(target, prunable, multiple, fill=final)
            plan = agreed_plans({multiple: plan}, prunable.layers[0].weight.device)[multiple]
            state.target.share = target.share_after(plan)
            state.target.met = final or state.target.share <= target.share + NEAR
            event = {
                "target": target.share,
                "share_left": state.target.share,
                "coefficient": state.coefficient,
            }
        event |= {
            "planning_seconds": time.perf_counter() - started,
            "zeroed_channels": zeroed,
            "round_to": multiple,
            "channels_without_rounding": sum(row.outputs[1] for row in plans[1].layers),
        }
        return [*actions, Reconfigure(plan, event, self.check_outputs)]

    def _within(
        self, target: ChannelTarget, prunable: PrunableLayers, multiple: int, *, fill: bool
    ) -> SurgeryPlan:
        """What is zero, none of it beyond the target; with ``fill`` as much as is missing."""

        model, example = prunable.model, prunable.example
        assert model is not None
        assert example is not None

        def make(
            stay: Mapping[str, Tensor], remove_layers: bool, scheme: Scheme = self.scheme
        ) -> SurgeryPlan:
            return plans_from_zeros(
                model, example, self.threshold, scheme, (multiple,), self.sides or "both",
                stay=stay, remove_layers=remove_layers,
            )[multiple]  # fmt: skip

        union = functools.partial(make, scheme="union")
        return plan_within(target, make, union, round_to=multiple, fill=fill)

    def surgery_plan(self, prunable: PrunableLayers, round_to: int = 1) -> SurgeryPlan:
        """What would be removed from the network as it is."""
        return self._plans(prunable, (round_to,))[round_to]

    def _plans(self, prunable: PrunableLayers, multiples: Sequence[int]) -> dict[int, SurgeryPlan]:
        """`surgery_plan` for each multiple."""
        assert prunable.model is not None
        if prunable.example is None:
            return dict.fromkeys(multiples, SurgeryPlan())
        return plans_from_zeros(
            prunable.model, prunable.example, self.threshold, self.scheme, multiples, self.sides or "both"
        )

    def _seen(self, state: PruneTrainState, prunable: PrunableLayers) -> SeenBatch:
        """The last training batch; in a run that was resumed behind it, a blank one of its form."""
        if prunable.seen is not None:
            return prunable.seen
        assert prunable.example is not None
        return (state.batch or BatchForm(tuple(first_tensor(as_inputs(prunable.example)).shape))).blank(
            prunable.example
        )

    def after_surgery(self, state: PruneTrainState, plan: SurgeryPlan, prunable: PrunableLayers) -> None:
        """The channels of the smaller network."""
        state.target.follow(plan)
        state.axes = state.shrunk = self._axes(prunable)
        state.view = None
        if (target := self._view(state, prunable)) is not None:
            state.target.held = target.held(target.norms())
            self._hold(state, target)

    def at_end(self, state: PruneTrainState, prunable: PrunableLayers) -> Sequence[Action]:
        """What is zero at the end of the run goes too (once: it went at its time)."""
        if prunable.example is None or (self.reconfigure == "once" and state.done):
            return ()
        if state.axes is None:
            self._look(state, prunable)
        return self.reconfigure_now(state, prunable, state.reconfigured, final=True)

    def penalised_channels(self, state: PruneTrainState) -> Axes:
        """All that can be removed, after the lasso has ended too: what is zero could come back."""
        return state.axes or {}

    def targets_of(self, state: PruneTrainState, reached: Reached) -> Sequence[Target]:
        """The share of the cost that is left; of a fixed penalty, which asks for none, the weights."""
        if self.target is None:
            share = reached.conv_weights_now / max(reached.conv_weights, 1)
            return [Target("convolution weights left", None, share, "share", "the penalty is fixed")]
        asked, left = self.target[1], state.target.share
        reason = ""
        if abs(left - asked) > NOTED * asked:
            reason = "no channel was left to remove"
            if state.round_to is not None and state.round_to > 1:
                reason = f"widths are multiples of {state.round_to}"
            elif state.target.dense is None:
                reason = "the run ended before a batch was seen"
            elif left > asked:
                reason = "every channel that is left is needed, or larger than what is missing"
        return [Target(f"{self._what} left", asked, left, "share", reason)]

    # ---- what is shown and saved ------------------------------------------------------------

    def plan(
        self, prunable: PrunableLayers, length: RunLength, state: PruneTrainState | None = None
    ) -> PruningPlan:
        """Per layer: channels now, how many would go at once, and why one stays."""
        changes = {}
        if prunable.model is not None and prunable.example is not None:
            multiple = None if state is None else state.round_to
            changes = {row.name: row for row in self.surgery_plan(prunable, multiple or self._given).layers}
        rows, full, kept = [], 0, 0
        for layer in prunable.layers:
            change = changes.get(layer.name)
            density, note = 1.0, "excluded" if matches(layer.name, self.exclude) else ""
            if change is not None:
                before, after = (
                    math.prod((change.inputs[0], change.outputs[0])),
                    math.prod((change.inputs[1], change.outputs[1])),
                )
                density = after / max(before, 1)
                note = change.stays or note
            weights = math.prod(layer.shape)
            full, kept = full + weights, kept + round(weights * density)
            settled = density if density < 1 or (state is not None and state.done) else None
            rows.append(LayerPlan(layer.name, layer.shape, "channels", settled, None, note))
        every = self.interval_of(length)
        when = {
            "interval": f"every {every:g} epoch{'s' if every != 1 else ''} and at the end",
            "once": f"once, after epoch {self._once(length):g}",
            "end": "at the end of the run only",
        }[self.reconfigure]
        strength = (
            f"coefficient {self.coefficient:g}"
            if self.coefficient is not None
            else f"{self.penalty_ratio:g} of the whole loss at the first step"
        )
        widths = (
            "widths as the device likes them" if self.round_to == "auto" else f"widths in {self.round_to}s"
        )
        stages = [
            ("lasso", f"over input and output channels, {strength}, {self.update}"),
            (
                "reconfiguration",
                f"{when}; {self.scheme}, threshold {self.threshold:g}, {widths}",
            ),
        ]
        if self.target is not None:
            stages.insert(0, ("target", self._target_line(length)))
        if self.fine_tune:
            stages.append(("fine-tune", f"the last {self.fine_tune:g} epochs without the lasso"))
        summary = f"{full - kept} of {full} weights would be removed as the network is now"
        return PruningPlan(plan_rows(prunable, rows), summary, tuple(stages))

    def _target_line(self, length: RunLength) -> str:
        assert self.target is not None
        when = self.target_epoch(length)
        by = "at the end of the run" if when >= length.epochs else f"after epoch {when}"
        return (
            f"{self.target[1]:g} of the {self._what} left {by}, where the lasso ends; every layer keeps "
            f"{self.floor:g} of its channels"
        )

    def state_dict(self, state: PruneTrainState) -> dict[str, Any]:
        """Numbers and strings."""
        return {
            "stage": state.stage,
            "coefficient": state.coefficient,
            "reconfigured": state.reconfigured,
            "done": state.done,
            "round_to": state.round_to,
            "batch": None if state.batch is None else list(state.batch),
            "target": state.target.state_dict(),
        }

    def load_state(
        self, prunable: PrunableLayers, length: RunLength, saved: Mapping[str, Any]
    ) -> PruneTrainState:
        """Inverse of `state_dict`, on the network as it was then."""
        state = PruneTrainState(
            saved["stage"], saved["coefficient"], saved["reconfigured"], saved["done"], saved["round_to"]
        )
        if saved.get("batch") is not None:  # not in states of older versions
            shape, strides, autocast = saved["batch"]
            state.batch = BatchForm(tuple(shape), tuple(strides), autocast)
        if "target" in saved:  # not in states of older versions
            state.target = TargetState.from_state(saved["target"])
        if prunable.example is not None:
            self._look(state, prunable)
        return state
