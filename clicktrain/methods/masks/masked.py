"""What methods that mask weights share: scores, the masks' life until they are frozen, plan and state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.formats.packed import bits_from_mask, mask_from_bits
from clicktrain.graph.prunable import PrunableLayer, PrunableLayers, check_convolutions, find_prunable
from clicktrain.methods.base import (
    Action,
    LayerPlan,
    Method,
    PruningPlan,
    Record,
    RunLength,
    StepInfo,
    hard_prune,
    plan_rows,
)
from clicktrain.methods.outcome import Reached, Target, planned_far_off, sparsity_target
from clicktrain.methods.saved_state import restored_state, saved_state
from clicktrain.methods.triggers import KernelWatch
from clicktrain.runs.events import StageEvent
from clicktrain.sparsity.importance import CRITERIA, CriterionChoice, magnitude_importance, reads_gradient
from clicktrain.sparsity.masks import KeptWeights, kept_weights

Tensors = dict[str, Tensor]
"""Layer name -> one tensor, in the weight's own shape."""


@dataclass(slots=True)
class MaskState:
    """What a method that masks weights keeps between steps."""

    stage: str = "dense"
    seed: int = 0
    updated: int = 0
    """Batches seen at the last update."""
    threshold: float = 0.0
    """Share that the last mask was for, of methods with a rising threshold."""
    shift: int = 0
    """Batches by which pruning began earlier than it would have."""
    masks: Tensors = field(default_factory=dict)
    squares: Tensors = field(default_factory=dict)
    """Running mean of the squared gradient per layer, for criteria that read gradients."""
    hidden: Tensors = field(default_factory=dict)
    """Values of weights that are zero in the network but trained on."""
    gradients: Tensors = field(default_factory=dict, compare=False)
    """Gradients of this step; empty between steps."""
    memory: dict[str, float] = field(default_factory=dict)
    """Numbers that rules keep from update to update."""
    kernels: KernelWatch = field(default_factory=KernelWatch)
    """For triggers that read EPI, before the first mask."""
    kept: dict[str, KeptWeights] = field(default_factory=dict)
    """What the frozen masks keep per layer; the masks themselves are the network's then."""


@dataclass(frozen=True, kw_only=True)
class Masked(Method[MaskState]):
    """A method that masks weights while training, until masks are frozen; subclasses say when and which."""

    reason: ClassVar[str] = "every layer keeps whole units"
    """Why the sparsity asked for cannot always be met exactly."""
    same_everywhere: ClassVar[bool] = False
    """Whether every layer has the same target."""

    sparsity: float = 0.8
    """Share of the pruned layers' weights that is zero at the end."""
    criterion: CriterionChoice = "magnitude"
    """Importance of a weight: (g*w)^2, w^2 (the paper's), |g|*w^2, or a function of your own."""
    exclude: tuple[str, ...] = ()
    """Layers to leave dense, by module path (shell-style)."""
    include: tuple[str, ...] = ()
    """Convolutions to prune although they would be left alone (the first, depthwise ones)."""
    linear: bool = True
    """Prune fully connected layers too."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        if not 0 < self.sparsity < 1:
            raise UserError(f"sparsity is a share and must be between 0 and 1, not {self.sparsity}")

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, the last of which has frozen masks."""
        return ("dense", "dynamic", "fixed")

    @property
    def unit(self) -> str:
        """What has to have a meaning in a layer for it to be pruned."""
        return "weight"

    def unit_refusal(self, layer: PrunableLayer) -> str | None:
        """Why the unit has no meaning in a convolution, or None."""
        return layer.unit_refusal(self.unit)

    # ---- scores -----------------------------------------------------------------------------

    @property
    def reads_gradient(self) -> bool:
        """Whether scores need gradients."""
        return reads_gradient(CRITERIA.resolve(self.criterion))

    def scores(self, layer: PrunableLayer, grad: Tensor | None) -> Tensor:
        """Score of every weight, in the weight's shape; magnitudes where a gradient is needed and missing."""
        criterion, weight = CRITERIA.resolve(self.criterion), layer.weight.detach().float()
        if grad is None:
            return (magnitude_importance if reads_gradient(criterion) else criterion)(weight, weight)
        return criterion(weight, grad.detach().float())

    # ---- life cycle -------------------------------------------------------------------------

    @property
    def prunes_linear(self) -> bool:
        """Whether linear layers are pruned too."""
        return self.linear

    def find_prunable(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> PrunableLayers:
        """Convolutions, and linear layers unless they are to stay dense, where the unit has a meaning."""
        prunable = find_prunable(
            model, trained, exclude=self.exclude, include=self.include, linear=self.prunes_linear
        )
        refusals = {layer.name: self.unit_refusal(layer) for layer in prunable.convs}
        return leave_alone(prunable, {name: why for name, why in refusals.items() if why is not None})

    def init(self, prunable: PrunableLayers, length: RunLength) -> MaskState:
        """Check that the run can be done as asked."""
        del length
        check_convolutions(prunable, self.title)
        CRITERIA.resolve(self.criterion)
        return self.new_state()

    def new_state(self) -> MaskState:
        """A state before the first step."""
        return MaskState()

    def enter(self, state: MaskState, stage: str, reason: str) -> Action:
        """Begin a stage; what is written down about it."""
        state.stage = stage
        number = self.stages.index(stage) + 1
        return Record(StageEvent(stage=stage, number=number, reason=reason))

    def keep_gradients(self, state: MaskState, prunable: PrunableLayers, step: StepInfo) -> None:
        """Copy this step's gradients into the state, until the update that reads them."""
        for layer in prunable.layers:
            grad = step.gradient(layer.weight)
            if grad is not None:
                state.gradients[layer.name] = grad.detach().clone()

    def last_masks(self, state: MaskState, prunable: PrunableLayers) -> Tensors:
        """The masks that are frozen; those of the last update by default."""
        del prunable
        return state.masks

    def fix(
        self, state: MaskState, prunable: PrunableLayers, reason: str, masks: Tensors | None = None
    ) -> list[Action]:
        """Freeze the masks, `last_masks` unless some are given: from now on these are the only weights."""
        if state.stage == "fixed":
            return []
        state.masks = self.last_masks(state, prunable) if masks is None else masks
        state.threshold, state.stage, state.squares = self.sparsity, "fixed", {}
        state.hidden, state.gradients = {}, {}
        targets = dict.fromkeys(state.masks, self.sparsity) if self.same_everywhere else {}
        pruned = hard_prune(prunable, state.masks, sparsity_asked=self.sparsity, layer_targets=targets)
        return [*pruned, self.enter(state, "fixed", reason)]

    def at_end(self, state: MaskState, prunable: PrunableLayers) -> Sequence[Action]:
        """A run always ends with frozen masks."""
        return self.fix(state, prunable, "the run ended")

    def targets_of(self, state: MaskState, reached: Reached) -> Sequence[Target]:
        """Sparsity of the layers that are pruned."""
        del state
        return [sparsity_target(self.sparsity, reached, self.reason)]

    def after_freeze(self, state: MaskState, masks: Mapping[str, Tensor]) -> None:
        """The network holds the masks from here on."""
        state.kept = {name: kept_weights(mask) for name, mask in masks.items()}
        state.masks = {}

    # ---- what is shown and saved ------------------------------------------------------------

    def show(
        self,
        prunable: PrunableLayers,
        state: MaskState | None,
        rows: Sequence[LayerPlan],
        stages: Sequence[tuple[str, str]],
        planned: float | None = None,
    ) -> PruningPlan:
        """The plan: a row per layer as planned, with what was reached where masks are frozen.

        ``planned`` is the sparsity over all layers, where the rows do not say it.
        """
        reached = {} if state is None else state.kept
        done = []
        for row in rows:
            if row.name in reached:
                nonzero, per_filter = reached[row.name]
                row = replace(row, density=nonzero / math.prod(row.shape), nnz_per_filter=per_filter)
            done.append(row)
        weights = sum(math.prod(row.shape) for row in done)
        pruned = sum((1 - (row.density or 0.0)) * math.prod(row.shape) for row in done) / max(weights, 1)
        if planned is not None and not reached:
            pruned = planned
        summary = self.summary(prunable, pruned, "reached" if reached else "planned")
        return PruningPlan(plan_rows(prunable, done), summary, tuple(stages))

    def summary(self, prunable: PrunableLayers, sparsity: float, how: str) -> str:
        """The last line of a plan: the target, and the sparsity of all layers planned or reached."""
        return (
            f"sparsity asked {self.sparsity:g}, {how} {sparsity:.3f} of the "
            f"weights of {len(prunable.layers)} layers{planned_far_off(self.sparsity, sparsity)}"
        )

    def state_dict(self, state: MaskState) -> dict[str, Any]:
        """Nested dicts of tensors, numbers and strings; masks with one bit a weight."""
        bits = {name: bits_from_mask(mask) for name, mask in state.masks.items()}
        return {**saved_state(state), "masks": bits}

    def load_state(self, prunable: PrunableLayers, length: RunLength, saved: Mapping[str, Any]) -> MaskState:
        """Inverse of `state_dict`."""
        del length
        device = prunable.layers[0].weight.device if prunable.layers else "cpu"
        state, layers = (
            restored_state(type(self.new_state()), saved, device),
            {each.name: each for each in prunable.layers},
        )
        state.masks = {name: mask_from_bits(m, layers[name].shape) for name, m in state.masks.items()}
        return state


def leave_alone(prunable: PrunableLayers, reasons: Mapping[str, str]) -> PrunableLayers:
    """The same layers without these, which stay dense for a reason."""
    out = [layer for layer in prunable.layers if layer.name in reasons]
    left = {**prunable.left_alone, **{layer.name: (layer.shape, reasons[layer.name]) for layer in out}}
    other = prunable.other_conv_weights + sum(layer.weight.numel() for layer in out if layer.kind == "conv")
    kept = tuple(layer for layer in prunable.layers if layer.name not in reasons)
    return replace(prunable, layers=kept, left_alone=left, other_conv_weights=other)
