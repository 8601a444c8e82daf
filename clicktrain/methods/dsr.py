"""Dynamic sparse reparameterization: Campfire's Table 4 compares with it (Mostafa and Wang, ICML 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayers
from clicktrain.methods.base import RunLength
from clicktrain.methods.masks.growing import Growing
from clicktrain.methods.masks.masked import MaskState
from clicktrain.methods.masks.update_times import check_shares
from clicktrain.sparsity.distributions import DistributionChoice
from clicktrain.sparsity.regrowth import (
    DROPS,
    FIRST_THRESHOLD,
    TOLERANCE,
    DropChoice,
    GrowthChoice,
    Units,
    Update,
)


@dataclass(frozen=True, kw_only=True)
class DSR(Growing):
    """Move weights across layers by one threshold (Mostafa and Wang, 2019).

    What is below the threshold is dropped; as many weights grow, at zero, in the layers in proportion to what
    survived there. The number of active weights stays; the layers' densities follow from training.
    """

    name: ClassVar[str] = "dsr"
    title: ClassVar[str] = "DSR"
    usual_interval: ClassVar[tuple[int, int]] = (1000, 100)
    doubling: ClassVar[bool] = True

    densities: DistributionChoice = "uniform"
    """Weights over layers at the beginning: the same share everywhere (the paper's), or
    Erdos-Renyi-kernel."""
    drop: float = 0.08
    """Share of the active weights that each update is to drop (N_p); 0.08 is 400,000 of the 5.1 million that
    ResNet-50 has at a sparsity of 0.8."""
    drop_rule: DropChoice = "threshold"
    """Which are dropped: what is below one adaptive threshold (the paper's), or the smallest of each layer or
    of the whole network."""
    tolerance: float = TOLERANCE
    """The threshold is doubled or halved when the number dropped is off by more than this share (delta)."""
    threshold: float = FIRST_THRESHOLD
    """Threshold H at the first update, a magnitude."""
    growth: GrowthChoice = "random"
    """Where weights grow inside a layer: at random positions (the paper's), or at the largest gradients."""
    interval: int | None = None
    """Batches between updates in the first quarter of the run, doubled in each further one; by default 1,000,
    or a hundredth of a run of under 100,000 batches."""
    stop: float = 0.95
    """Share of the run after which masks are frozen."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        check_shares(self, ("drop", "tolerance"))
        if not 0 < self.threshold < float("inf"):
            raise UserError(f"threshold must be above 0, not {self.threshold}")

    @property
    def decided_by(self) -> str:
        """Weights grow where weights survive."""
        return "what survives in each layer"

    def init(self, prunable: PrunableLayers, length: RunLength) -> MaskState:
        """Choose the first positions."""
        state = super().init(prunable, length)
        state.memory = {"threshold": self.threshold, "tolerance": self.tolerance}
        return state

    def move(self, now: Update) -> tuple[Units, Units]:
        """Algorithm 1: what was lost anywhere grows in the layers in proportion to their survivors."""
        kept = DROPS.resolve(self.drop_rule)(now, self.drop)
        return kept, self.grow(now, kept, now.by_survivors(kept, self.budget(now)))

    def describe(self) -> str:
        """How units move, in words."""
        return (
            f"what is under a threshold, about {100 * self.drop:g}% of all, is dropped, "
            f"{self.grown} grow in layers by their survivors"
        )
