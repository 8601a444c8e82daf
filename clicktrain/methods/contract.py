"""A method's side of the driver: settings, explicit state, hooks, and the actions that they return."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from types import MappingProxyType
from typing import Any, ClassVar, Generic, NamedTuple, TypeAlias, TypeVar

from torch import Tensor, nn

from clicktrain.errors import UserError, shown
from clicktrain.formats.packed import Patterns
from clicktrain.graph.prunable import PrunableLayer, PrunableLayers, find_prunable
from clicktrain.latency.network_times import MeasureMasks
from clicktrain.methods.outcome import FAR_OFF, Reached, Target
from clicktrain.methods.saved_state import saved_state
from clicktrain.runs.events import ABSENT, Event, HardPruneEvent, ReconfiguredEvent
from clicktrain.settings import SaidOnce, check_choices
from clicktrain.sparsity.channel_lasso import ChannelAxis
from clicktrain.sparsity.masks import energy_outside, sparsity_of
from clicktrain.surgery import SurgeryPlan
from clicktrain.wording import html_table, html_text, table_lines


class Record(NamedTuple):
    """Record a decision: a typed event (`clicktrain.runs.events`)."""

    event: Event


class ApplyMasks(NamedTuple):
    """Zero weights that later steps may change again. Masks are bool, of their weight's shape.

    ``forget``: also zero the optimizer state of the masked weights (momentum, moments). Layers of which a
    method says that they may (`Method.mask_patterns`) are packed by it, once enough is zero: these masks then
    are their index, further ones re-index them, and they need not be named where they stay as they are.
    """

    masks: Mapping[str, Tensor]
    forget: bool = False


class FreezeMasks(NamedTuple):
    """Hard prune: zero the weights outside the masks, bool of the weights' shapes, for good."""

    masks: Mapping[str, Tensor]


class SilenceChannels(NamedTuple):
    """Zero whatever a plan would cut along the output channels of layers, without removing it.

    These are filters, their biases and the scale and shift of their batch norms; the channels then carry
    nothing. Later steps may change them again.
    """

    plan: SurgeryPlan


class Reconfigure(NamedTuple):
    """Remove channels and layers physically, from the model and its optimizer.

    ``event`` says what the method decided by; the pruner completes it with what came of it. ``checked``:
    measure how much the output of the last batch changes, in evaluation mode.
    """

    plan: SurgeryPlan
    event: ReconfiguredEvent = ReconfiguredEvent()
    checked: bool = False


class RestoreTensors(NamedTuple):
    """Write values into parameters and buffers, by name, and drop their optimizer state."""

    values: Mapping[str, Tensor]


Action: TypeAlias = Record | ApplyMasks | FreezeMasks | SilenceChannels | Reconfigure | RestoreTensors


def hard_prune(
    prunable: PrunableLayers,
    masks: Mapping[str, Tensor],
    *,
    compression_asked: float | None = ABSENT,
    sparsity_asked: float = ABSENT,
    layer_targets: Mapping[str, float] = MappingProxyType({}),
) -> list[Action]:
    """Freeze masks, and record what that cuts.

    Args:
        prunable: the layers as they are, their pruned weights not yet zero.
        masks: layer name -> bool of the weight's shape, True = kept.
        compression_asked: what the method was asked for, all convolution weights / kept ones; or
        sparsity_asked: over the layers with masks, which are then listed with their sparsities.
        layer_targets: layer name -> the sparsity that the layer was to have, where there is one.
    """
    layers = [layer for layer in prunable.layers if layer.name in masks]
    energies = [energy_outside(layer.weight, masks[layer.name]) for layer in layers]
    lost, whole = (sum(part) for part in zip(*energies, strict=True)) if energies else (0.0, 0.0)
    counted = [masks[layer.name] for layer in prunable.counted if layer.name in masks]
    pruned = sum(mask.numel() - int(mask.sum()) for mask in counted)
    event = HardPruneEvent(
        compression_asked=compression_asked,
        compression_reached=prunable.conv_weights / max(prunable.conv_weights - pruned, 1),
        energy_outside=lost / whole if whole else 0.0,
    )
    if sparsity_asked is not ABSENT:
        rows = []
        for layer in layers:
            wanted = {"target_sparsity": layer_targets[layer.name]} if layer.name in layer_targets else {}
            true = sparsity_of({layer.name: masks[layer.name]})
            rows.append({"name": layer.name, "shape": list(layer.shape), **wanted, "true_sparsity": true})
        event = dataclasses.replace(
            event, sparsity_asked=sparsity_asked, sparsity_reached=sparsity_of(masks), layers=rows
        )
    return [Record(event), FreezeMasks(dict(masks))]


@dataclass(frozen=True, slots=True)
class RunLength:
    """Length of a run in batches seen by `Pruner.observe`, of which several may make one optimizer step."""

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
        seen: batches observed so far, including those of this step.
        batches: batches whose gradients this step holds (more than 1 with gradient accumulation).
        loss: mean loss since the last optimizer step, 0-dim, detached.
        epoch_losses: mean training loss of every finished epoch.
        length: of the run, with the batches of the running epoch.
        epoch: finished epochs before the batches of this step.
        position: epochs done, including those batches: 2.5 in the middle of the third epoch.
        ends_epoch: this step includes the last batch of an epoch.
        learning_rate: divided by 1 - momentum for SGD: how far a constant gradient of 1 moves a weight per
            step in the long run.
        relative_rates: learning rates over that one, of parameters that have another, by `id`.
        grad_scale: factor that is still in the gradients (fused mixed-precision optimizers), or None.
        adaptive: the optimizer's step is not the learning rate times the gradient, as SGD's is.
        norm_scaled: it moves a parameter in proportion to the parameter's norm (LAMB, LARS, Adafactor).
        whole_gradients: gradients of masked dense weights are those of all processes at pruned positions too,
            where a method uses them (`MethodHooks.wants_gradients`).
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
    relative_rates: Mapping[int, float] = field(default_factory=dict)
    grad_scale: Tensor | None = None
    adaptive: bool = False
    norm_scaled: bool = False
    whole_gradients: bool = True

    def relative_rate(self, parameter: Tensor) -> float:
        """The learning rate of a parameter over `learning_rate`: 1 unless rates differ by layer."""
        return self.relative_rates.get(id(parameter), 1.0)

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """The gradient of a parameter without the mixed-precision scale; None if it has none."""
        grad = parameter.grad
        if grad is None or self.grad_scale is None:
            return grad
        return grad / self.grad_scale.to(grad)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What will happen, or has happened, to one layer; density and nonzeros are None until decided."""

    name: str
    shape: tuple[int, ...]
    action: str
    density: float | None = None
    nnz_per_filter: int | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """What a method does to each layer, and why it leaves a layer alone; ``str(plan)`` is a table."""

    rows: tuple[LayerPlan, ...]
    summary: str = ""
    stages: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        stages = [f"{name}: {what}" for name, what in self.stages]
        return "\n".join([*table_lines(self._table), *stages, self.summary]).rstrip()

    def _repr_html_(self) -> str:
        stages = "".join(
            f"<li><b>{html_text(name)}</b>: {html_text(what)}</li>" for name, what in self.stages
        )
        return f"{html_table(self._table)}<ul>{stages}</ul><p>{html_text(self.summary)}</p>"

    @property
    def warning(self) -> str | None:
        """What is known before the run about a target that will be missed, or None."""
        return self.summary if FAR_OFF in self.summary else None

    @property
    def _table(self) -> list[tuple[str, ...]]:
        """The head and a row per layer."""
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
        return [head, *body]


def plan_rows(prunable: PrunableLayers, rows: Sequence[LayerPlan]) -> tuple[LayerPlan, ...]:
    """Add rows for the layers that are left alone, and sort all rows by the network's order."""
    untouched = [
        LayerPlan(name, shape, "none", 1.0, reason=reason)
        for name, (shape, reason) in prunable.left_alone.items()
    ]
    return tuple(sorted((*rows, *untouched), key=lambda row: prunable.order.index(row.name)))


S = TypeVar("S")


class MethodHooks(SaidOnce, abc.ABC, Generic[S]):
    """Settings (a frozen dataclass), and hooks that change a state ``S`` in place and return actions.

    A state is a dataclass of tensors, numbers, strings and containers of them.
    """

    name: ClassVar[str]
    """Key in `clicktrain.methods.METHODS`, as typed on the command line."""
    title: ClassVar[str]
    """Name in reports and sentences."""
    contract_exempt: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Properties of ``tests/methods/test_contract.py`` that have no meaning for this method -> why."""
    reads_graph: ClassVar[bool] = False
    """The method needs the dependency graph: `PrunableLayers.example` is then set, at the latest by the
    first forward pass."""
    prunes: ClassVar[bool] = True
    """The method removes or masks weights."""
    freezes: ClassVar[bool] = True
    """A run of the method has a moment at which masks are frozen."""
    dense_until_chosen: ClassVar[bool] = False
    """Weights are dense until masks are chosen, once, which a `FinalizedEvent` says."""

    def __post_init__(self) -> None:
        """Check every setting that is a choice; turn lists into tuples."""
        check_choices(self)

    @property
    def expects_trained(self) -> bool:
        """Whether the method needs a network that was trained before."""
        return False

    @property
    def keeps_inputs(self) -> bool:
        """Whether the last training batch is kept in `PrunableLayers.seen`."""
        return False

    def find_prunable(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> PrunableLayers:
        """Find the layers that this method may prune."""
        return find_prunable(model, trained)

    def fitted(self, prunable: PrunableLayers) -> MethodHooks[S]:
        """Return these settings completed by what follows from the network; the pruner goes on with them."""
        del prunable
        return self

    @abc.abstractmethod
    def init(self, prunable: PrunableLayers, length: RunLength) -> S:
        """Return the state before the first step; raise UserError if the target cannot be met."""

    def use_measure(self, state: S, prunable: PrunableLayers, measure: MeasureMasks | None) -> None:
        """Take a function that times the network with masks, or None; called after `init` and `load_state`.

        Raises:
            UserError: a latency that is the target cannot be met.
        """
        del state, prunable, measure

    @abc.abstractmethod
    def plan(self, prunable: PrunableLayers, length: RunLength, state: S | None = None) -> PruningPlan:
        """Describe what will be done, or, given a state that has decided, what was done."""

    def stage(self, state: S) -> str:
        """Name of the current stage; the state's ``stage`` by default."""
        return str(getattr(state, "stage", "dense"))

    def cut_epoch(self, state: S, length: RunLength, *, latest: bool = False) -> float | None:
        """Epochs done when masks are to be frozen, as far as settings and state say; None: not known yet.

        ``latest``: at the latest, where it is not known. A run that is too short is a UserError.
        """
        del state, length, latest
        return None

    def at_start(self, state: S, prunable: PrunableLayers, length: RunLength) -> Sequence[Action]:
        """Return the actions before the first forward pass, for networks that start out sparse.

        Masks cannot be frozen here: a resumed run calls this too, before its state is loaded.
        """
        return ()

    def before_step(self, state: S, prunable: PrunableLayers, step: StepInfo) -> None:
        """Read gradients, or add to them, before the optimizer's step."""
        del state, prunable, step

    def mask_patterns(self, state: S, layer: PrunableLayer) -> Patterns | None:
        """The patterns that a layer's kernels may have as long as its masks move; none of them: any.

        Naming them says that the layer may be packed from now on, while its masks move: weights outside are
        zero and nobody's, so that neither their optimizer state nor, except where `wants_gradients` says so,
        their gradients are needed. Code is generated for these patterns once: from then on masks of the layer
        have to keep to them. Not asked any more once layers are packed.

        Returns:
            Kept positions of a kernel, in 0 to R*S - 1, of each pattern; None where the layer has to be dense
            until its masks are frozen.
        """
        del state, layer
        return None

    def wants_gradients(self, state: S, length: RunLength, seen: int) -> bool:
        """Whether the step after ``seen`` batches uses the gradients of pruned weights.

        `before_step` reads them, or the optimizer moves pruned weights by them. Packed layers compute them
        only then, and only such steps are counted with them (`train_flops_ratio_nominal`). Asked ahead of
        every batch, about the step that it may end in.
        """
        del state, length, seen
        return False

    def after_packing(self, state: S, names: Collection[str]) -> None:
        """Release the masks of layers that are packed now and hold them: see `PrunableLayer.packed_mask`."""
        del state, names

    def after_step(self, state: S, prunable: PrunableLayers, step: StepInfo) -> Sequence[Action]:
        """Decide, after the optimizer's step."""
        return ()

    def at_end(self, state: S, prunable: PrunableLayers) -> Sequence[Action]:
        """Decide whatever is still undecided at the end of the run."""
        return ()

    def after_surgery(self, state: S, plan: SurgeryPlan, prunable: PrunableLayers) -> None:
        """Shrink the state by the channels that were removed; ``prunable`` is of the smaller model."""
        del state, plan, prunable

    def targets_of(self, state: S, reached: Reached) -> Sequence[Target]:
        """Return each target with the value reached and, if missed, why; none if nothing was asked for."""
        return ()

    def after_freeze(self, state: S, masks: Mapping[str, Tensor]) -> None:
        """Release what only served to choose the masks, which are frozen now, not what `plan` shows of them.

        ``masks``: layer name -> bool of the weight's shape; with several processes, those of the first one.
        """
        del state, masks

    def penalized_channels(self, state: S) -> Mapping[str, tuple[ChannelAxis, ...]]:
        """Map layer names to the channels that a penalty pushes towards zero; none in most methods."""
        return {}

    def state_dict(self, state: S) -> dict[str, Any]:
        """Return the state as nested dicts of tensors, numbers and strings."""
        return {} if state is None else saved_state(state)

    def load_state(self, prunable: PrunableLayers, length: RunLength, saved: Mapping[str, Any]) -> S:
        """Inverse of `state_dict`; states other than None take `restored_state`."""
        return self.init(prunable, length)
