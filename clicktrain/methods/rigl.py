"""RigL: sparse from the first step, growing where the gradient is largest (Evci et al., ICML 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clicktrain.methods.base import RunLength
from clicktrain.methods.masks.dynamic import Densities, DropShare, Growth
from clicktrain.methods.masks.dynamic_method import DynamicSparse
from clicktrain.methods.masks.update_times import Timing, make_timing
from clicktrain.sparsity.regrowth import UnitKind


@dataclass(frozen=True, kw_only=True)
class RigL(DynamicSparse):
    """Sparse training: the smallest weights go, those with the largest gradients grow (RigL, 2020).

    With random growth it is SET (Mocanu et al. 2018). Positions are fixed, and the fast operators take over,
    when the last update is done (stop).
    """

    name: ClassVar[str] = "rigl"
    title: ClassVar[str] = "RigL"
    redistribute: ClassVar[bool] = False

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

    @property
    def drop_rule(self) -> DropShare:
        """The smallest of each layer."""
        return DropShare(self.drop)

    @property
    def dropped(self) -> str:
        """What an update drops, in words."""
        return f"the smallest {100 * self.drop:g}%, falling to 0 by a cosine, are"

    def timing(self, length: RunLength) -> Timing:
        """When units move."""
        return make_timing(length, self.interval, min(100, length.total // 50), self.stop)
