"""RigL: sparse from the first step, growing where the gradient is largest (Evci et al., ICML 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clicktrain.methods.masks.growing import Growing
from clicktrain.methods.masks.update_times import check_shares
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.regrowth import DROPS, DropChoice, Units, Update
from clicktrain.sparsity.schedules import ScheduleChoice, left_at


@dataclass(frozen=True, kw_only=True)
class RigL(Growing):
    """Drop the smallest weights, grow at large gradients (RigL, 2020).

    With random growth it is SET (Mocanu et al. 2018). Masks are frozen when the last update is done (stop);
    packed layers run on the fast operators from the first step.
    """

    name: ClassVar[str] = "rigl"
    title: ClassVar[str] = "RigL"
    usual_interval: ClassVar[tuple[int, int]] = (100, 50)

    drop: float = 0.3
    """Share of the active weights dropped at the first update (alpha)."""
    drop_rule: DropChoice = "layer"
    """Which are dropped: the smallest of each layer (the paper's), of the whole network, or what is below one
    adaptive threshold (DSR's)."""
    drop_schedule: ScheduleChoice = "cosine"
    """How the share that is dropped falls to 0 until the last update."""
    interval: int | None = None
    """Batches between updates; by default 100, or a fiftieth of a run of under 5,000 batches."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        check_shares(self, ("drop",))

    def move(self, now: Update) -> tuple[Units, Units]:
        """Algorithm 1: each layer grows as many as it lost."""
        kept = DROPS.resolve(self.drop_rule)(now, self.drop * left_at(self.drop_schedule, now.done))
        return kept, self.grow(now, kept, now.lost(kept))

    def describe(self) -> str:
        """How units move, in words."""
        return (
            f"the smallest {100 * self.drop:g}%, falling to 0 by {choice_name(self.drop_schedule)}, are "
            f"dropped, {self.grown} grow in the same layer"
        )
