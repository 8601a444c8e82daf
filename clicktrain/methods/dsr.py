"""Dynamic sparse reparameterization: Campfire's Table 4 compares with it (Mostafa and Wang, ICML 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.methods.base import Action, Method, PruningPlan, RunLength, Step
from clicktrain.methods.dynamic_masks import (
    Densities,
    DropBelow,
    DynamicMasks,
    DynamicState,
    Growth,
    dynamic_state_dict,
    load_dynamic_state,
)
from clicktrain.methods.survey import Survey, survey
from clicktrain.methods.update_times import Timing, check_shares, check_times, make_timing
from clicktrain.sparsity.regrowth import UnitKind


@dataclass(frozen=True, kw_only=True)
class DSR(Method[DynamicState]):
    """Sparse training that moves weights over all layers, by one adaptive threshold (Mostafa and Wang, 2019).

    What is below the threshold is dropped; as many weights grow, at zero, in the layers in proportion to what
    survived there. The number of living weights stays; the layers' densities follow from training.
    """

    name: ClassVar[str] = "dsr"

    sparsity: float = 0.8
    """Share of the pruned layers' weights that is zero, from the first step to the last."""
    granularity: UnitKind = "weight"
    """What is dropped and grown: single weights, or whole kernels (by their mean magnitude)."""
    densities: Densities = "uniform"
    """Weights over layers at the beginning: the same share everywhere (the paper's), or
    Erdos-Renyi-kernel."""
    drop: float = 0.08
    """Share of the living weights that each update is to drop (N_p); 0.08 is 400,000 of the 5.1 million that
    ResNet-50 has at a sparsity of 0.8."""
    tolerance: float = 0.1
    """The threshold is doubled or halved when the number dropped is off by more than this share (delta)."""
    threshold: float = 0.001
    """Threshold H at the first update, a magnitude."""
    growth: Growth = "random"
    """Where weights grow inside a layer: at random positions (the paper's), or at the largest gradients."""
    interval: int | None = None
    """Batches between updates in the first quarter of the run, doubled in each further one; by default 1,000,
    or a hundredth of a run of under 100,000 batches."""
    stop: float = 0.95
    """Share of the run after which positions are fixed."""
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
        object.__setattr__(self, "exclude", tuple(self.exclude))
        object.__setattr__(self, "include", tuple(self.include))
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise UserError(f"{key} must be one of {', '.join(choices)}, not {getattr(self, key)!r}")
        check_shares(self, ("sparsity", "drop", "tolerance"))
        if not 0 < self.threshold < float("inf"):
            raise UserError(f"threshold must be above 0, not {self.threshold}")
        check_times(self.interval, self.stop, self.mask_seed)

    @property
    def masks(self) -> DynamicMasks:
        """The composition that this method is."""
        return DynamicMasks(
            sparsity=self.sparsity,
            kind=self.granularity,
            densities=self.densities,
            drop=DropBelow(self.drop, self.tolerance),
            growth=self.growth,
            redistribute=True,
        )

    def timing(self, length: RunLength) -> Timing:
        """When units move."""
        return make_timing(length, self.interval, min(1000, length.total // 100), self.stop, doubling=True)

    def survey(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> Survey:
        """Convolutions, and fully connected layers unless they are to stay dense."""
        return survey(model, trained, exclude=self.exclude, include=self.include, linear=self.linear)

    def init(self, found: Survey, length: RunLength) -> DynamicState:
        """Choose the first positions."""
        self.timing(length)
        state = self.masks.init(found, self.mask_seed, "DSR")
        state.threshold = self.threshold
        return state

    def stage(self, state: DynamicState) -> str:
        """dynamic or fixed."""
        return state.stage

    def at_start(self, state: DynamicState, found: Survey, length: RunLength) -> Sequence[Action]:
        """Sparse before the first forward pass."""
        del found, length
        return self.masks.at_start(state)

    def before_step(self, state: DynamicState, found: Survey, step: Step) -> None:
        """Mask the gradients."""
        self.masks.before_step(state, found, step, self.timing(step.length))

    def after_step(self, state: DynamicState, found: Survey, step: Step) -> Sequence[Action]:
        """Drop and grow when it is time (Algorithm 1)."""
        return self.masks.after_step(state, found, step, self.timing(step.length))

    def at_end(self, state: DynamicState, found: Survey) -> Sequence[Action]:
        """Positions are fixed at the latest when the run is over."""
        return self.masks.fix(state, found, "the run ended")

    def plan(self, found: Survey, length: RunLength, state: DynamicState | None = None) -> PruningPlan:
        """Per layer: density and units."""
        how = f"what is under a threshold, about {100 * self.drop:g}% of all, is"
        return self.masks.plan(found, state, self.timing(length), how)

    def state_dict(self, state: DynamicState) -> dict[str, Any]:
        """Nested dicts of tensors and numbers."""
        return dynamic_state_dict(state)

    def load_state(self, found: Survey, length: RunLength, saved: Mapping[str, Any]) -> DynamicState:
        """Inverse of `state_dict`."""
        del length
        return load_dynamic_state(found, saved)


_CHOICES: dict[str, tuple[str, ...]] = {
    "granularity": get_args(UnitKind),
    "densities": get_args(Densities),
    "growth": get_args(Growth),
}
