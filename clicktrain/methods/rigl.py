"""RigL: sparse from the first step, growing where the gradient is largest (Evci et al., ICML 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.methods.base import Action, Method, PruningPlan, RunLength, Step
from clicktrain.methods.dynamic_masks import (
    Densities,
    DropShare,
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
class RigL(Method[DynamicState]):
    """Sparse training: the smallest weights go, those with the largest gradients grow (RigL, 2020).

    With random growth it is SET (Mocanu et al. 2018). Positions are fixed, and the fast operators take over,
    when the last update is done (stop).
    """

    name: ClassVar[str] = "rigl"

    sparsity: float = 0.8
    """Share of the pruned layers' weights that is zero, from the first step to the last."""
    granularity: UnitKind = "weight"
    """What is dropped and grown: single weights (the paper's), or whole kernels."""
    densities: Densities = "erk"
    """Weights over layers: Erdos-Renyi-kernel (small layers denser), or the same share everywhere."""
    drop: float = 0.3
    """Share of a layer's living weights dropped at the first update (alpha); falls to 0 by a cosine."""
    growth: Growth = "gradient"
    """Where as many grow: at the largest gradients, or at random positions (SET)."""
    interval: int | None = None
    """Batches between updates; by default 100, or a fiftieth of a run of under 5,000 batches."""
    stop: float = 0.75
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
        check_shares(self, ("sparsity", "drop"))
        check_times(self.interval, self.stop, self.mask_seed)

    @property
    def masks(self) -> DynamicMasks:
        """The composition that this method is."""
        return DynamicMasks(
            sparsity=self.sparsity,
            kind=self.granularity,
            densities=self.densities,
            drop=DropShare(self.drop),
            growth=self.growth,
            redistribute=False,
        )

    def timing(self, length: RunLength) -> Timing:
        """When units move."""
        return make_timing(length, self.interval, min(100, length.total // 50), self.stop)

    def survey(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> Survey:
        """Convolutions, and fully connected layers unless they are to stay dense."""
        return survey(model, trained, exclude=self.exclude, include=self.include, linear=self.linear)

    def init(self, found: Survey, length: RunLength) -> DynamicState:
        """Choose the first positions."""
        self.timing(length)
        return self.masks.init(found, self.mask_seed, "RigL")

    def stage(self, state: DynamicState) -> str:
        """dynamic or fixed."""
        return state.stage

    def at_start(self, state: DynamicState, found: Survey, length: RunLength) -> Sequence[Action]:
        """Sparse before the first forward pass."""
        del found, length
        return self.masks.at_start(state)

    def before_step(self, state: DynamicState, found: Survey, step: Step) -> None:
        """Read the dense gradients when it is time; mask them."""
        self.masks.before_step(state, found, step, self.timing(step.length))

    def after_step(self, state: DynamicState, found: Survey, step: Step) -> Sequence[Action]:
        """Drop and grow when it is time (Algorithm 1)."""
        return self.masks.after_step(state, found, step, self.timing(step.length))

    def at_end(self, state: DynamicState, found: Survey) -> Sequence[Action]:
        """Positions are fixed at the latest when the run is over."""
        return self.masks.fix(state, found, "the run ended")

    def plan(self, found: Survey, length: RunLength, state: DynamicState | None = None) -> PruningPlan:
        """Per layer: density and units."""
        how = f"the smallest {100 * self.drop:g}%, falling to 0 by a cosine, are"
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
