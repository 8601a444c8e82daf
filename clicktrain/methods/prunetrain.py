"""PruneTrain: a group lasso over channels, and a network that becomes smaller while it trains (section 4).

Every step adds the lasso's gradient, or shrinks channels by it (`channels.lasso`). Every ``interval`` epochs
channels under the threshold are set to zero, and those that are zero on both sides, or that no layer reads,
are removed, with layers of residual branches that have become zero (`channels.removal`). The paper's own
comparisons are the same composition with another rhythm: one reconfiguration at a given epoch (Alvarez and
Salzmann), none before the end (SSL). What is zero at the end of the run is removed in each of them.

Where no penalty is given, a run has a target, the share of FLOPs or parameters to be left, and the
coefficient is steered towards it (`channels.steering`); that is not in the paper.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.graph import as_inputs
from clicktrain.graph.inputs import first_tensor
from clicktrain.graph.prunable import PrunableLayers, check_convolutions, find_prunable, matches
from clicktrain.latency.channel_multiple import BatchForm
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
from clicktrain.methods.channels.costs import Cost
from clicktrain.methods.channels.lasso import Axes, ChannelLasso, LassoState, channel_axes
from clicktrain.methods.channels.removal import Rhythm, ZeroRemoval, agree
from clicktrain.methods.channels.steering import Steering, TargetState
from clicktrain.methods.channels.target import NEAR
from clicktrain.methods.outcome import Reached, Target
from clicktrain.methods.saved_state import restored_state
from clicktrain.runs.events import PenaltyEvent, ReconfiguredEvent, StageEvent, WidthsEvent
from clicktrain.settings import part_of
from clicktrain.surgery import SurgeryPlan

PRESETS: dict[str, dict[str, Any]] = {
    "default": {"update": "proximal", "sides": "readers", "floor": 0.1, "round_to": "device"},
    "paper": {"update": "gradient", "sides": "both", "floor": 0.0, "round_to": 1},
}
TARGET_FLOPS = 0.6
"""The target where neither a target nor a penalty is given."""
PENALTY_RATIO = 0.25
"""The strongest of the paper's (5.1); with a target, where steering starts."""


@dataclass(slots=True)
class PruneTrainState:
    """State of PruneTrain between steps."""

    stage: str = "sparsify"
    reconfigured: float = 0.0
    """Epoch of the last reconfiguration."""
    done: bool = False
    """Whether there was one."""
    round_to: int | None = None
    """Multiple of the widths at the last reconfiguration; None while there was nothing to choose."""
    batch: BatchForm | None = None
    """Form of the last training batch, where widths are chosen by timing."""
    lasso: LassoState = field(default_factory=LassoState)
    target: TargetState = field(default_factory=TargetState)


@dataclass(frozen=True, kw_only=True)
class ChannelSettings:
    """Settings of PruneTrain that compositions with it have too."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("target_flops", "target_parameters"),
        ("penalty_ratio", "coefficient"),
    )

    target_flops: float | None = None
    """Share of the inference FLOPs that is to be left; the lasso is steered towards it. 0.6 by default,
    unless target_parameters, penalty_ratio, coefficient or PruneTrain's preset paper is given."""
    target_parameters: float | None = None
    """Share of the parameters that is to be left, instead."""
    floor: float | None = None
    """Share of each layer's channels that stays, one at least; 0.1 by default (paper: 0). They are not
    penalized. Without a target, layers of residual branches keep none, so that whole branches can go."""
    penalty_ratio: float | None = None
    """Share of the whole loss that the lasso has at the first step, 0.25 by default; sets its coefficient
    (the paper's 0.2 to 0.25 prune in runs of 182 epochs). With a target, where steering starts."""
    coefficient: float | None = None
    """Coefficient of the lasso itself, instead of the penalty ratio."""
    update: Literal["proximal", "gradient"] | None = None
    """How the lasso acts: shrink channels after each step, to exactly zero (the default), or add its gradient
    (the paper's, which needs a long run to come under the threshold)."""
    interval: float | None = None
    """Epochs between reconfigurations; 1/18 of the run by default, as the paper's 10 of 182 and 5 of 90."""
    scheme: Literal["union", "gating"] = "union"
    """How the layers of a residual stage agree: keep what one of them needs, or select and scatter channels
    around each branch."""
    sides: Literal["both", "readers"] | None = None
    """Remove a channel when no layer reads it (readers, the default), or only when it is zero on both sides
    (both, the paper's, which removes later). Neither changes what the network computes."""
    round_to: int | Literal["auto", "device"] | None = None
    """Widths that remain are multiples of it, where the layer is wide enough; device (default): 8 on GPUs,
    whose tensor cores take these without padding, 1 elsewhere (paper: 1); auto: the multiple with which the
    network that is left trains fastest on this device, measured at each reconfiguration."""
    check_outputs: bool = False
    """At every reconfiguration, measure how much the network's output changes on the last batch."""


@dataclass(frozen=True, kw_only=True)
class PruneTrain(ChannelSettings, Method[PruneTrainState]):
    """Remove channels and layers while the network trains (PruneTrain, 2019)."""

    name: ClassVar[str] = "prunetrain"
    title: ClassVar[str] = "PruneTrain"
    freezes: ClassVar[bool] = False
    reads_graph: ClassVar[bool] = True

    preset: Literal["default", "paper"] = "default"
    """Where settings that are not given come from: what works in short runs, with a target, or the paper,
    with a penalty alone."""
    target_at: float | None = None
    """Epoch at whose end the target is met, where need be by removing the smallest norms; 3/4 of the run by
    default."""
    reconfigure: Literal["interval", "once", "end"] = "interval"
    """When channels are removed while the network trains: every interval (PruneTrain), once (Alvarez and
    Salzmann), or not at all (SSL); what is zero at the end of the run goes in any case."""
    once_at: float | None = None
    """Epoch of the only reconfiguration before the end (reconfigure: once); half of the run by default."""
    threshold: float = 1e-4
    """Channels whose weights are all at most this large are set to zero."""
    fine_tune: float = 0.0
    """Epochs without the lasso at the end of the run."""
    linear: bool = True
    """Penalize the input channels of linear layers too."""
    exclude: tuple[str, ...] = ()
    """Layers without penalty, by module path (shell-style)."""

    def __post_init__(self) -> None:
        """Fill in the preset and check every setting."""
        if self.preset not in PRESETS:
            raise UserError(f"preset must be one of {', '.join(PRESETS)}, not {self.preset!r}")
        given = (self.target_flops, self.target_parameters, self.penalty_ratio, self.coefficient)
        if self.preset == "default" and all(value is None for value in given):
            object.__setattr__(self, "target_flops", TARGET_FLOPS)
        for key, value in {**PRESETS[self.preset], "penalty_ratio": PENALTY_RATIO}.items():
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
        if self.coefficient is not None and not 0 < self.coefficient < math.inf:
            raise UserError(f"coefficient must be above 0, not {self.coefficient}")
        _ = self.rhythm, self.removal

    # ---- the parts --------------------------------------------------------------------------

    @property
    def target(self) -> tuple[Cost, float] | None:
        """What is to be left, and which share of it; None where the penalty is fixed."""
        if self.target_flops is not None:
            return "flops", self.target_flops
        return None if self.target_parameters is None else ("parameters", self.target_parameters)

    @property
    def rhythm(self) -> Rhythm:
        """When channels are removed."""
        return part_of(Rhythm, self)

    @property
    def lasso(self) -> ChannelLasso:
        """What pushes channels to zero."""
        return part_of(ChannelLasso, self)

    @property
    def removal(self) -> ZeroRemoval:
        """How zero channels are removed."""
        return part_of(ZeroRemoval, self)

    @property
    def steering(self) -> Steering:
        """What the lasso is steered towards, and what every layer keeps."""
        return Steering(self.target, self.floor or 0.0, self.sides == "both")

    def target_epoch(self, length: RunLength) -> int:
        """Finished epochs when the target is met; the run's length: at its end."""
        return self.rhythm.target_epoch(length)

    @property
    def keeps_inputs(self) -> bool:
        """For ``check_outputs``, and to time steps on (``round_to: auto``)."""
        return self.check_outputs or self.round_to == "auto"

    def find_prunable(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> PrunableLayers:
        """Every convolution, the first and depthwise ones too, and linear layers."""
        return find_prunable(model, trained, exclude=self.exclude, include=("*",), linear=True)

    # ---- life cycle -------------------------------------------------------------------------

    def init(self, prunable: PrunableLayers, length: RunLength) -> PruneTrainState:
        """Check that the run can be done as asked."""
        check_convolutions(prunable, self.title)
        self.rhythm.check(length)
        known = None if self.round_to == "auto" else self.removal.fixed_multiple(prunable)
        state = PruneTrainState(round_to=known)
        if prunable.example is not None:
            self._look(state, prunable)
        return state

    def _look(self, state: PruneTrainState, prunable: PrunableLayers) -> None:
        """Find the channels of the network; UserError if none, or not enough, can be removed."""
        self.steering.look(state.target, state.lasso, prunable, self._axes(prunable))

    def _axes(self, prunable: PrunableLayers) -> Axes:
        layers = prunable.layers if self.linear else prunable.convs
        names = [layer.name for layer in layers if not matches(layer.name, self.exclude)]
        assert prunable.model is not None
        return channel_axes(prunable.model, prunable.example, names)

    def before_step(self, state: PruneTrainState, prunable: PrunableLayers, step: StepInfo) -> None:
        """Set the coefficient, at the first step by Eq. (3); add the lasso's gradient."""
        if state.lasso.axes is None:
            self._look(state, prunable)
        if state.stage != "sparsify":
            return
        self.lasso.start(state.lasso, prunable, step.loss)
        self.steering.begin_step(state.target, state.lasso, prunable, step, self.target_epoch(step.length))
        self.lasso.before_step(state.lasso, prunable, step, steered=bool(state.target.steered))

    def after_step(
        self, state: PruneTrainState, prunable: PrunableLayers, step: StepInfo
    ) -> Sequence[Action]:
        """Shrink; reconfigure at the end of an epoch, when it is time; no lasso in the last epochs."""
        if state.stage == "sparsify":
            self.lasso.after_step(state.lasso, prunable, step, steered=bool(state.target.steered))
        if not step.ends_epoch:
            return ()
        if self.round_to == "auto" and prunable.seen is not None:
            state.batch = BatchForm.of(prunable.seen)
        epoch, length, rhythm = math.floor(step.position), step.length, self.rhythm
        actions: list[Action] = []
        if state.reconfigured == 0 and step.epoch == 0 and state.lasso.coefficient is not None:
            share = self.penalty_ratio if self.coefficient is None else None
            actions.append(Record(PenaltyEvent(coefficient=state.lasso.coefficient, penalty_ratio=share)))
        final = self.target is not None and epoch >= rhythm.target_epoch(length)
        due = rhythm.due(epoch, state.reconfigured, state.done, length)
        if epoch < length.epochs and (due or (final and not state.target.met)):
            actions += self.reconfigure_now(state, prunable, epoch, final=final)
        if state.stage == "sparsify" and (state.target.met or rhythm.tunes(epoch, length)):
            state.stage, reason = "fine-tune", f"epoch {epoch} begins"
            if state.target.met:
                reason = f"{state.target.share:.3f} of the {self.steering.what} are left"
            actions.append(Record(StageEvent(stage=state.stage, number=2, reason=reason)))
        return actions

    def reconfigure_now(
        self, state: PruneTrainState, prunable: PrunableLayers, epoch: float, *, final: bool = False
    ) -> list[Action]:
        """4.1, 4.2: zero what is under the threshold, remove what is zero on both sides.

        ``final``: and what the target lacks, by the smallest norms.
        """
        started = time.perf_counter()
        state.reconfigured, state.done = epoch, True
        zeroed = self.removal.zero_small_(prunable, state.lasso.axes or self._axes(prunable))
        plans = agree(prunable, self.removal.plans(prunable))
        actions: list[Action] = []
        multiple = self.removal.fixed_multiple(prunable)
        if self.round_to == "auto":
            batch = state.batch or BatchForm(tuple(first_tensor(as_inputs(prunable.example)).shape))
            # A run that was resumed after the last batch has a blank one of its form.
            choice = self.removal.choose_width(
                prunable, prunable.seen or batch.blank(prunable.example), plans
            )
            if choice is not None:
                state.round_to = choice.chosen
                actions.append(Record(WidthsEvent(**choice.to_json())))
            multiple = state.round_to or 1
        plan, event = plans[multiple], ReconfiguredEvent()
        target = None if self.target is None else self.steering.view(state.target, state.lasso, prunable)
        if target is not None:
            plan = self.removal.within(target, prunable, multiple, fill=final)
            state.target.share = target.share_after(plan)
            state.target.met = final or state.target.share <= target.share + NEAR
            event = ReconfiguredEvent(
                target=target.share, share_left=state.target.share, coefficient=state.lasso.coefficient
            )
        event = replace(
            event,
            planning_seconds=time.perf_counter() - started,
            zeroed_channels=zeroed,
            round_to=multiple,
            channels_without_rounding=sum(row.outputs[1] for row in plans[1].layers),
        )
        return [*actions, Reconfigure(plan, event, self.check_outputs)]

    def after_surgery(self, state: PruneTrainState, plan: SurgeryPlan, prunable: PrunableLayers) -> None:
        """Take over the channels of the smaller network."""
        self.steering.follow(state.target, state.lasso, prunable, self._axes(prunable), plan)

    def at_end(self, state: PruneTrainState, prunable: PrunableLayers) -> Sequence[Action]:
        """Remove what is zero at the end of the run, whatever the rhythm while it trained."""
        if prunable.example is None:
            return ()
        if state.lasso.axes is None:
            self._look(state, prunable)
        return self.reconfigure_now(state, prunable, state.reconfigured, final=True)

    def penalized_channels(self, state: PruneTrainState) -> Axes:
        """All channels that can be removed, also after the lasso has ended: zero channels could come back."""
        return state.lasso.axes or {}

    def targets_of(self, state: PruneTrainState, reached: Reached) -> Sequence[Target]:
        """The share of the cost that is left; of the weights for a fixed penalty, which has no target."""
        if self.target is not None:
            return [self.steering.outcome(state.target, state.round_to)]
        share = reached.conv_weights_now / max(reached.conv_weights, 1)
        return [Target("convolution weights left", None, share, "share", "the penalty is fixed")]

    # ---- what is shown and saved ------------------------------------------------------------

    def plan(
        self, prunable: PrunableLayers, length: RunLength, state: PruneTrainState | None = None
    ) -> PruningPlan:
        """Per layer: the share that would be left if channels were removed now, and why one stays."""
        multiple = (None if state is None else state.round_to) or self.removal.fixed_multiple(prunable)
        plan = self.removal.plans(prunable, (multiple,))[multiple]
        changes = {row.name: row for row in plan.layers}
        rows, full, kept = [], 0, 0
        for layer in prunable.layers:
            change = changes.get(layer.name)
            density, note = 1.0, "excluded" if matches(layer.name, self.exclude) else ""
            if change is not None:
                before, after = (change.inputs[i] * change.outputs[i] for i in range(2))
                density = after / max(before, 1)
                note = change.stays or note
            weights = math.prod(layer.shape)
            full, kept = full + weights, kept + round(weights * density)
            settled = density if density < 1 or (state is not None and state.done) else None
            rows.append(LayerPlan(layer.name, layer.shape, "channels", settled, None, note))
        stages = [
            ("lasso", self.lasso.describe()),
            ("reconfiguration", f"{self.rhythm.describe(length)}; {self.removal.describe()}"),
        ]
        if self.target is not None:
            when = self.target_epoch(length)
            by = "at the end of the run" if when >= length.epochs else f"after epoch {when}"
            line = f"{self.target[1]:g} of the {self.steering.what} left {by}, where the lasso ends"
            stages.insert(0, ("target", f"{line}; every layer keeps {self.floor:g} of its channels"))
        if self.fine_tune:
            stages.append(("fine-tune", f"the last {self.fine_tune:g} epochs without the lasso"))
        summary = f"{full - kept} of {full} weights would be removed as the network is now"
        return PruningPlan(plan_rows(prunable, rows), summary, tuple(stages))

    def load_state(
        self, prunable: PrunableLayers, length: RunLength, saved: Mapping[str, Any]
    ) -> PruneTrainState:
        """The inverse of `state_dict`, on the network as it was then."""
        del length
        state = restored_state(PruneTrainState, saved)
        if prunable.example is not None:
            self._look(state, prunable)
        return state
