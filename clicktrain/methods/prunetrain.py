"""PruneTrain: a group lasso over channels, and a network that becomes smaller while it trains (section 4).

Every step adds the lasso's gradient, or shrinks channels by it (`sparsity.channel_lasso`). Every ``interval``
epochs channels under the threshold are set to zero, and those that are zero on both sides, or that no layer
reads, are removed, with layers of residual branches that have become zero (`surgery.plan_from_zeros`). The
paper's own comparisons are the same composition with another rhythm: one reconfiguration at a given epoch
(Alvarez and Salzmann), none before the end (SSL).
"""

from __future__ import annotations

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
from clicktrain.methods.agreed_plans import agreed_plans
from clicktrain.methods.base import (
    Action,
    LayerPlan,
    Method,
    PruningPlan,
    Reconfigure,
    Record,
    RunLength,
    Step,
    plan_rows,
)
from clicktrain.methods.channel_axes import channel_axes
from clicktrain.methods.fast_widths import MULTIPLES, BatchForm, fastest_multiple
from clicktrain.methods.settings import check_choices, keep_as_tuples
from clicktrain.methods.survey import SeenBatch, Survey, matches, survey
from clicktrain.sparsity.channel_lasso import (
    ChannelAxis,
    add_channel_lasso_gradient_,
    channel_penalty,
    coefficient_for_ratio,
    shrink_channels_,
    zero_small_channels_,
)
from clicktrain.surgery import SurgeryPlan, plans_from_zeros

Axes = dict[str, tuple[ChannelAxis, ...]]


PRESETS: dict[str, dict[str, str]] = {
    "default": {"update": "proximal", "sides": "readers"},
    "paper": {"update": "gradient", "sides": "both"},
}


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
    axes: Axes | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class PruneTrain(Method[PruneTrainState]):
    """Channels and layers are removed while the network trains (PruneTrain, 2019)."""

    name: ClassVar[str] = "prunetrain"
    reads_graph: ClassVar[bool] = True

    preset: Literal["default", "paper"] = "default"
    """Where ``update`` and ``sides`` come from if not given: what works in short runs, or the paper."""
    penalty_ratio: float = 0.25
    """Share of the whole loss that the lasso has at the first step; sets its coefficient (0.2 to 0.25 in runs
    of 182 epochs; short runs need more)."""
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
        for key, value in PRESETS[self.preset].items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)
        keep_as_tuples(self, "exclude")
        check_choices(self, _CHOICES)
        if not 0 <= self.penalty_ratio < 1:
            raise UserError(f"penalty_ratio must be at least 0 and below 1, not {self.penalty_ratio}")
        for key in ("coefficient", "interval", "once_at"):
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

    @property
    def keeps_inputs(self) -> bool:
        """For ``check_outputs``, and to time steps on (``round_to: auto``)."""
        return self.check_outputs or self.round_to == "auto"

    @property
    def _given(self) -> int:
        return 1 if self.round_to == "auto" else self.round_to

    # ---- what and when ----------------------------------------------------------------------

    def survey(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> Survey:
        """Every convolution, the first and depthwise ones too, and fully connected layers."""
        return survey(model, trained, exclude=self.exclude, include=("*",), linear=True)

    def interval_of(self, length: RunLength) -> float:
        """Epochs between two reconfigurations."""
        return self.interval or float(max(1, round(length.epochs / 18)))

    def init(self, found: Survey, length: RunLength) -> PruneTrainState:
        """Check that the run can be done as asked."""
        if not found.layers:
            reasons = "; ".join(f"{name}: {why}" for name, (_, why) in list(found.left_alone.items())[:3])
            raise UserError(f"this network has no convolution to prune ({reasons or 'none at all'})")
        if self.once_at is not None and self.once_at > length.epochs:
            raise UserError(f"once_at is {self.once_at:g} but the run has {length.epochs} epochs")
        if self.fine_tune >= length.epochs:
            raise UserError(
                f"fine_tune is {self.fine_tune:g} epochs: leave some of the {length.epochs} to the lasso"
            )
        state = PruneTrainState(round_to=None if self.round_to == "auto" else self.round_to)
        if found.example is not None:
            state.axes = self._axes(found)
        return state

    def _axes(self, found: Survey) -> Axes:
        assert found.model is not None
        assert found.example is not None
        names = [layer.name for layer in found.layers if not matches(layer.name, self.exclude)]
        if self.linear:
            names += [layer.name for layer in found.linears if not matches(layer.name, self.exclude)]
        axes = channel_axes(found.model, found.example, names)
        if not axes:
            raise UserError(
                "no channel of this network can be removed: 'clicktrain train --dry-run' says why"
            )
        return axes

    def _weights(self, found: Survey, axes: Axes) -> list[tuple[Tensor, tuple[ChannelAxis, ...]]]:
        return [(layer.weight, axes[layer.name]) for layer in found.prunable if layer.name in axes]

    def stage(self, state: PruneTrainState) -> str:
        """sparsify, or fine-tune without the lasso."""
        return state.stage

    # ---- steps ------------------------------------------------------------------------------

    def before_step(self, state: PruneTrainState, found: Survey, step: Step) -> None:
        """Set the coefficient at the first step (Eq. (3)); add the lasso's gradient."""
        if state.stage != "sparsify":
            return
        if state.axes is None:
            state.axes = self._axes(found)
        weights = self._weights(found, state.axes)
        if state.coefficient is None:
            penalty = float(torch.stack([channel_penalty(w.float(), a) for w, a in weights]).sum())
            state.coefficient = self.coefficient or coefficient_for_ratio(
                self.penalty_ratio, float(step.loss), penalty
            )
        if self.update == "proximal":
            return
        strength: float | Tensor = state.coefficient
        if step.grad_scale is not None:
            strength = step.grad_scale * strength
        for weight, axes in weights:
            if weight.grad is not None:
                add_channel_lasso_gradient_(weight.grad, weight.detach(), axes, strength)

    def after_step(self, state: PruneTrainState, found: Survey, step: Step) -> Sequence[Action]:
        """Shrink; reconfigure at the end of an epoch, when it is time; no lasso in the last epochs."""
        if self.update == "proximal" and state.stage == "sparsify" and state.coefficient is not None:
            for weight, axes in self._weights(found, state.axes or {}):
                shrink_channels_(weight, axes, state.coefficient * step.learning_rate)
        if not step.ends_epoch:
            return ()
        if self.round_to == "auto" and found.seen is not None:
            state.batch = BatchForm.of(found.seen)
        epoch = math.floor(step.position)
        actions: list[Action] = []
        if state.reconfigured == 0 and step.epoch == 0 and state.coefficient is not None:
            share = self.penalty_ratio if self.coefficient is None else None
            event = {"event": "penalty", "coefficient": state.coefficient, "penalty_ratio": share}
            actions.append(Record(event))
        last = epoch >= step.length.epochs
        if not last and self._due(state, epoch, step.length):
            actions += self.reconfigure_now(state, found, epoch)
        if state.stage == "sparsify" and self.fine_tune and epoch >= step.length.epochs - self.fine_tune:
            state.stage = "fine-tune"
            event = {"event": "stage", "stage": state.stage, "number": 2, "reason": f"epoch {epoch} begins"}
            actions.append(Record(event))
        return actions

    def _due(self, state: PruneTrainState, epoch: int, length: RunLength) -> bool:
        if self.reconfigure == "interval":
            return epoch - state.reconfigured >= self.interval_of(length)
        at = self.once_at if self.once_at is not None else length.epochs / 2
        return self.reconfigure == "once" and not state.done and epoch >= at

    def reconfigure_now(self, state: PruneTrainState, found: Survey, epoch: float) -> list[Action]:
        """4.1, 4.2: zero what is under the threshold, remove what is zero on both sides."""
        started = time.perf_counter()
        assert found.model is not None
        state.reconfigured, state.done = epoch, True
        axes = state.axes or self._axes(found)
        zeroed = sum(zero_small_channels_(w, a, self.threshold) for w, a in self._weights(found, axes))
        actions: list[Action] = []
        candidates = MULTIPLES if self.round_to == "auto" else sorted({1, self.round_to})
        plans = agreed_plans(self._plans(found, candidates), found.prunable[0].weight.device)
        multiple = self._given
        if self.round_to == "auto":
            choice = fastest_multiple(found.model, self._seen(state, found), plans)
            if choice is not None:
                state.round_to = choice.chosen
                actions.append(Record({"event": "widths", **choice.to_json()}))
            multiple = state.round_to or 1
        event = {
            "planning_seconds": time.perf_counter() - started,
            "zeroed_channels": zeroed,
            "round_to": multiple,
            "channels_without_rounding": sum(row.outputs[1] for row in plans[1].layers),
        }
        return [*actions, Reconfigure(plans[multiple], event, self.check_outputs)]

    def surgery_plan(self, found: Survey, round_to: int = 1) -> SurgeryPlan:
        """What would be removed from the network as it is."""
        return self._plans(found, (round_to,))[round_to]

    def _plans(self, found: Survey, multiples: Sequence[int]) -> dict[int, SurgeryPlan]:
        """`surgery_plan` for each multiple."""
        assert found.model is not None
        if found.example is None:
            return dict.fromkeys(multiples, SurgeryPlan())
        return plans_from_zeros(
            found.model, found.example, self.threshold, self.scheme, multiples, self.sides or "both"
        )

    def _seen(self, state: PruneTrainState, found: Survey) -> SeenBatch:
        """The last training batch; in a run that was resumed behind it, a blank one of its form."""
        if found.seen is not None:
            return found.seen
        assert found.example is not None
        return (state.batch or BatchForm(tuple(first_tensor(as_inputs(found.example)).shape))).blank(
            found.example
        )

    def after_surgery(self, state: PruneTrainState, plan: SurgeryPlan, found: Survey) -> None:
        """The channels of the smaller network."""
        del plan
        state.axes = self._axes(found)

    def at_end(self, state: PruneTrainState, found: Survey) -> Sequence[Action]:
        """What is zero at the end of the run goes too (once: it went at its time)."""
        if found.example is None or (self.reconfigure == "once" and state.done):
            return ()
        return self.reconfigure_now(state, found, state.reconfigured)

    def penalised_channels(self, state: PruneTrainState) -> Axes:
        """All that can be removed, after the lasso has ended too: what is zero could come back."""
        return state.axes or {}

    # ---- what is shown and saved ------------------------------------------------------------

    def plan(self, found: Survey, length: RunLength, state: PruneTrainState | None = None) -> PruningPlan:
        """Per layer: channels now, how many would go at once, and why one stays."""
        changes = {}
        if found.model is not None and found.example is not None:
            multiple = None if state is None else state.round_to
            changes = {row.name: row for row in self.surgery_plan(found, multiple or self._given).layers}
        rows, full, kept = [], 0, 0
        for layer in found.prunable:
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
            rows.append(LayerPlan(layer.name, layer.shape, "channels", density, None, note))
        every = self.interval_of(length)
        when = {
            "interval": f"every {every:g} epoch{'s' if every != 1 else ''} and at the end",
            "once": f"once, after epoch {self.once_at or length.epochs / 2:g}",
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
        if self.fine_tune:
            stages.append(("fine-tune", f"the last {self.fine_tune:g} epochs without the lasso"))
        summary = f"{full - kept} of {full} weights would be removed as the network is now"
        return PruningPlan(plan_rows(found, rows), summary, tuple(stages))

    def state_dict(self, state: PruneTrainState) -> dict[str, Any]:
        """Numbers and strings."""
        return {
            "stage": state.stage,
            "coefficient": state.coefficient,
            "reconfigured": state.reconfigured,
            "done": state.done,
            "round_to": state.round_to,
            "batch": None if state.batch is None else list(state.batch),
        }

    def load_state(self, found: Survey, length: RunLength, saved: Mapping[str, Any]) -> PruneTrainState:
        """Inverse of `state_dict`, on the network as it was then."""
        state = PruneTrainState(
            saved["stage"], saved["coefficient"], saved["reconfigured"], saved["done"], saved["round_to"]
        )
        if saved.get("batch") is not None:  # not in states of older versions
            shape, strides, autocast = saved["batch"]
            state.batch = BatchForm(tuple(shape), tuple(strides), autocast)
        if found.example is not None:
            state.axes = self._axes(found)
        return state


_CHOICES: dict[str, tuple[str, ...]] = {
    "reconfigure": ("interval", "once", "end"),
    "scheme": ("union", "gating"),
    "update": ("proximal", "gradient"),
    "sides": ("both", "readers"),
}
