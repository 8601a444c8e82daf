"""What methods of dynamic sparse training share: settings, and hooks, which `DynamicMasks` carries out."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from clicktrain.graph.prunable import PrunableLayers, find_prunable
from clicktrain.methods.base import Action, Method, PruningPlan, RunLength, StepInfo
from clicktrain.methods.masks.dynamic import (
    Densities,
    DropBelow,
    DropShare,
    DynamicMasks,
    DynamicState,
    Growth,
    dynamic_state_dict,
    load_dynamic_state,
)
from clicktrain.methods.masks.update_times import Timing, check_shares, check_times
from clicktrain.methods.outcome import Reached, Target, sparsity_target
from clicktrain.sparsity.regrowth import UnitKind


@dataclass(frozen=True, kw_only=True)
class DynamicSparse(Method[DynamicState]):
    """Sparse from the first step to the last, with positions that move; a method says by which rules."""

    redistribute: ClassVar[bool]
    """Whether what grows goes to layers by their survivors, not where it was lost."""

    granularity: UnitKind
    """What is dropped and grown: single weights, or whole kernels."""
    densities: Densities
    """Weights over layers at the beginning."""
    drop: float
    """Share of the living weights that an update drops."""
    growth: Growth
    """Where weights grow inside a layer."""
    interval: int | None = None
    """Batches between updates."""
    stop: float
    """Share of the run after which positions are fixed."""
    sparsity: float = 0.8
    """Share of the pruned layers' weights that is zero, from the first step to the last."""
    linear: bool = True
    """Prune fully connected layers too."""
    mask_seed: int | None = None
    """Seed of the random positions; the run's own by default."""
    exclude: tuple[str, ...] = ()
    """Layers to leave dense, by module path (shell-style)."""
    include: tuple[str, ...] = ()
    """Convolutions to prune although they would be left alone (the first, depthwise ones)."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        check_shares(self, ("sparsity", "drop"))
        check_times(self.interval, self.stop, self.mask_seed)

    @property
    @abc.abstractmethod
    def drop_rule(self) -> DropShare | DropBelow:
        """Which units an update drops."""

    @property
    @abc.abstractmethod
    def dropped(self) -> str:
        """What an update drops, in words: the subject of a sentence, with its verb."""

    @abc.abstractmethod
    def timing(self, length: RunLength) -> Timing:
        """When units move."""

    @property
    def masks(self) -> DynamicMasks:
        """The composition that this method is."""
        return DynamicMasks(
            sparsity=self.sparsity,
            kind=self.granularity,
            densities=self.densities,
            drop=self.drop_rule,
            growth=self.growth,
            redistribute=self.redistribute,
        )

    def find_prunable(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> PrunableLayers:
        """Convolutions, and fully connected layers unless they are to stay dense."""
        return find_prunable(model, trained, exclude=self.exclude, include=self.include, linear=self.linear)

    def init(self, prunable: PrunableLayers, length: RunLength) -> DynamicState:
        """Choose the first positions."""
        self.timing(length)
        return self.masks.init(prunable, self.mask_seed, self.title)

    def stage(self, state: DynamicState) -> str:
        """dynamic or fixed."""
        return state.stage

    def at_start(self, state: DynamicState, prunable: PrunableLayers, length: RunLength) -> Sequence[Action]:
        """Sparse before the first forward pass."""
        del prunable, length
        return self.masks.at_start(state)

    def before_step(self, state: DynamicState, prunable: PrunableLayers, step: StepInfo) -> None:
        """Read the dense gradients when it is time; mask them."""
        self.masks.before_step(state, prunable, step, self.timing(step.length))

    def after_step(self, state: DynamicState, prunable: PrunableLayers, step: StepInfo) -> Sequence[Action]:
        """Drop and grow when it is time (either paper's Algorithm 1)."""
        return self.masks.after_step(state, prunable, step, self.timing(step.length))

    def at_end(self, state: DynamicState, prunable: PrunableLayers) -> Sequence[Action]:
        """Positions are fixed at the latest when the run is over."""
        return self.masks.fix(state, prunable, "the run ended")

    def targets_of(self, state: DynamicState, reached: Reached) -> Sequence[Target]:
        """Sparsity of the layers that are pruned."""
        del state
        return [sparsity_target(self.sparsity, reached, "every filter keeps a weight, kernels are whole")]

    def after_freeze(self, state: DynamicState, masks: Mapping[str, Tensor]) -> None:
        """The network holds the masks from here on."""
        state.release(masks)

    def plan(
        self, prunable: PrunableLayers, length: RunLength, state: DynamicState | None = None
    ) -> PruningPlan:
        """Per layer: density and units."""
        return self.masks.plan(prunable, state, self.timing(length), self.dropped)

    def state_dict(self, state: DynamicState) -> dict[str, Any]:
        """Nested dicts of tensors and numbers."""
        return dynamic_state_dict(state)

    def load_state(
        self, prunable: PrunableLayers, length: RunLength, saved: Mapping[str, Any]
    ) -> DynamicState:
        """Inverse of `state_dict`."""
        del length
        return load_dynamic_state(prunable, saved)
