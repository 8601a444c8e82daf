"""What the pruner needs of a method: frozen settings, explicit state, and hooks that return actions."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from clicktrain.errors import UserError, shown
from clicktrain.graph.prunable import PrunableLayers, find_prunable
from clicktrain.latency.network_times import MeasureMasks
from clicktrain.methods.actions import Action
from clicktrain.methods.outcome import Reached, Target
from clicktrain.settings import check_choices
from clicktrain.sparsity.channel_lasso import ChannelAxis
from clicktrain.surgery import SurgeryPlan


@dataclass(frozen=True, slots=True)
class RunLength:
    """How long a run is, in batches seen by `Pruner.observe`.

    ``epochs`` x ``steps_per_epoch`` batches; with gradient accumulation several batches make one optimizer
    step.
    """

    epochs: int
    steps_per_epoch: int

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch"):
            value = getattr(self, name)
            if not isinstance(value, Integral):
                raise UserError(f"{name} is {shown(value)}: a whole number is needed")

    @property
    def total(self) -> int:
        """Batches of the whole run."""
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True, slots=True, eq=False)
class StepInfo:
    """What a method sees at one optimizer step.

    Attributes:
        seen: batches observed so far, those of this step included.
        batches: batches whose gradients this step holds (more than 1 with gradient accumulation).
        loss: mean loss since the last optimizer step, 0-dim, detached.
        epoch_losses: mean training loss of every finished epoch.
        length: how long the run is; the batches of an epoch are those of the running one.
        epoch: finished epochs before the batches of this step.
        position: epochs done, with those batches: 2.5 in the middle of the third.
        ends_epoch: the last batch of an epoch is among them.
        learning_rate: of this step, divided by 1 - momentum for SGD: how far a constant gradient of 1 moves a
            weight per step in the long run.
        grad_scale: what the gradients are still multiplied by (fused mixed-precision optimizers), or None.
        adaptive: the optimizer's step is not the learning rate times the gradient, as SGD's is.
    """

    seen: int
    batches: int
    loss: Tensor
    epoch_losses: Sequence[float]
    length: RunLength
    epoch: int = 0
    position: float = 0.0
    ends_epoch: bool = False
    learning_rate: float = 0.0
    grad_scale: Tensor | None = None
    adaptive: bool = False

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """The true gradient of a parameter, without a mixed-precision scale; None if there is none."""
        grad = parameter.grad
        if grad is None or self.grad_scale is None:
            return grad
        return grad / self.grad_scale.to(grad)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What is to happen, or has happened, to one layer.

    ``density`` and ``nnz_per_filter`` are None while they are not decided.
    """

    name: str
    shape: tuple[int, ...]
    action: str
    density: float | None = None
    nnz_per_filter: int | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """Layer by layer, what a method will do and why it leaves a layer alone. ``str(plan)`` is a table."""

    rows: tuple[LayerPlan, ...]
    summary: str = ""
    stages: tuple[tuple[str, str], ...] = field(default=())

    def __str__(self) -> str:
        head = ("layer", "shape", "what", "density", "per filter", "why")
        body = [
            (
                row.name,
                "x".join(map(str, row.shape)),
                row.action,
                "" if row.density is None else f"{row.density:.3f}",
                "" if row.nnz_per_filter is None else str(row.nnz_per_filter),
                row.reason,
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in [head, *body]
        ]
        stages = [f"{name}: {what}" for name, what in self.stages]
        return "\n".join([*lines, *stages, self.summary]).rstrip()


def plan_rows(prunable: PrunableLayers, rows: Sequence[LayerPlan]) -> tuple[LayerPlan, ...]:
    """The given rows and those of the layers that are left alone, in the network's order."""
    untouched = [
        LayerPlan(name, shape, "none", 1.0, reason=reason)
        for name, (shape, reason) in prunable.left_alone.items()
    ]
    return tuple(sorted((*rows, *untouched), key=lambda row: prunable.order.index(row.name)))


S = TypeVar("S")


class MethodHooks(abc.ABC, Generic[S]):
    """A recipe for pruning while training: settings here (a frozen dataclass), all that changes in ``S``.

    A state is a dataclass of tensors, numbers, strings and containers of them; the hooks change it in
    place and return what is to be done to the world.
    """

    name: ClassVar[str]
    """Key in `clicktrain.methods.METHODS`, as typed on the command line."""
    title: ClassVar[str]
    """Name in reports and sentences."""
    contract_exempt: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Properties of ``tests/methods/test_contract.py`` that have no meaning for this method -> why."""
    reads_graph: ClassVar[bool] = False
    """Whether the method needs the dependency graph: `PrunableLayers.example` is then set, at
    the first forward pass if the caller gave none."""
    prunes: ClassVar[bool] = True
    """Whether it takes anything away."""
    settings_exclude: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Check every setting that is a choice; lists become tuples."""
        check_choices(self)

    @property
    def expects_trained(self) -> bool:
        """Whether it makes sense only on a network that has been trained before."""
        return False

    @property
    def keeps_inputs(self) -> bool:
        """Whether the last training batch is kept, as `PrunableLayers.seen`."""
        return False

    def find_prunable(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> PrunableLayers:
        """Which layers this method may prune."""
        return find_prunable(model, trained)

    @abc.abstractmethod
    def init(self, prunable: PrunableLayers, length: RunLength) -> S:
        """State before the first step; raises UserError if what is asked for cannot be done."""

    def use_measure(self, state: S, prunable: PrunableLayers, measure: MeasureMasks | None) -> None:
        """After `init` and `load_state`: ``measure`` times the network with masks, None if nothing can.

        Raises:
            UserError: a latency that is the target cannot be met.
        """
        del state, prunable, measure

    @abc.abstractmethod
    def plan(self, prunable: PrunableLayers, length: RunLength, state: S | None = None) -> PruningPlan:
        """What will be done (or, given a state that has decided, what was done)."""

    def stage(self, state: S) -> str:
        """Name of the current stage."""
        del state
        return "dense"

    def at_start(self, state: S, prunable: PrunableLayers, length: RunLength) -> Sequence[Action]:
        """Nothing has been computed yet: what a network that is sparse from the first step starts with.

        Positions cannot be frozen here: a run that goes on comes through here too, before its state is known.
        """
        del state, prunable, length
        return ()

    def before_step(self, state: S, prunable: PrunableLayers, step: StepInfo) -> None:
        """Gradients are there: read them, add to them."""
        del state, prunable, step

    def after_step(self, state: S, prunable: PrunableLayers, step: StepInfo) -> Sequence[Action]:
        """Weights have moved: decide."""
        del state, prunable, step
        return ()

    def at_end(self, state: S, prunable: PrunableLayers) -> Sequence[Action]:
        """The run is over: whatever has not been decided is decided now."""
        del state, prunable
        return ()

    def after_surgery(self, state: S, plan: SurgeryPlan, prunable: PrunableLayers) -> None:
        """Channels have gone: shrink what the state holds. ``prunable`` is of the smaller model."""
        del state, plan, prunable

    def targets_of(self, state: S, reached: Reached) -> Sequence[Target]:
        """At the end: what was asked for, what was reached and why not; nothing if nothing was asked."""
        del state, reached
        return ()

    def after_freeze(self, state: S, masks: Mapping[str, Tensor]) -> None:
        """Masks are frozen and the network holds them: release what only served to choose them.

        Args:
            state: what `plan` shows of the masks has to stay in it.
            masks: the frozen ones, layer name -> bool of the weight's shape; where several processes train,
                those of the first one.
        """
        del state, masks

    def penalised_channels(self, state: S) -> Mapping[str, tuple[ChannelAxis, ...]]:
        """Layer name -> the channels that a penalty pushes towards zero; none in most methods."""
        del state
        return {}

    def state_dict(self, state: S) -> dict[str, Any]:
        """The state as nested dicts of tensors, numbers and strings."""
        del state
        return {}

    def load_state(self, prunable: PrunableLayers, length: RunLength, saved: Mapping[str, Any]) -> S:
        """Inverse of `state_dict`."""
        del saved
        return self.init(prunable, length)
