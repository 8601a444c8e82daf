"""MEST: memory-economic sparse training (Yuan et al., NeurIPS 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayer
from clicktrain.methods.masks.growing import Growing
from clicktrain.methods.masks.update_times import check_shares
from clicktrain.sparsity.distributions import DistributionChoice
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.regrowth import GrowthChoice, Units, Update
from clicktrain.sparsity.schedules import ScheduleChoice, left_at


@dataclass(frozen=True, kw_only=True)
class MEST(Growing):
    """Drop by weight and gradient, grow at random, ever less (MEST, 2021).

    With a soft bound the weights that grow come on top of the density asked for, and have to prove themselves
    until the next update, when the network shrinks to it; that surplus falls to nothing.
    """

    name: ClassVar[str] = "mest"
    title: ClassVar[str] = "MEST"
    moves_last: ClassVar[bool] = True

    densities: DistributionChoice = "uniform"
    """Weights over layers: the same share everywhere, or Erdos-Renyi-kernel (small layers denser)."""
    gradient_weight: float = 0.01
    """Lambda: how much the gradient counts beside the magnitude, in |w| + lambda |g|."""
    mutation: float = 0.05
    """Share of all of a layer's weights that moves at the first update (p)."""
    mutation_schedule: ScheduleChoice = "cosine"
    """How that share falls to 0 until the last update (elastic mutation)."""
    soft_bound: bool = True
    """Grow beyond the density asked for, and drop to it at the next update (EM&S); otherwise drop more and
    grow back to it (EM)."""
    growth: GrowthChoice = "random"
    """Where weights grow inside a layer: at random positions (the paper's), or at the largest gradients."""
    stop: float = 0.8
    """Share of the run after which masks are frozen."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        check_shares(self, ("mutation",))
        if not 0 <= self.gradient_weight < float("inf"):
            raise UserError(f"gradient_weight must not be negative, not {self.gradient_weight}")
        if not self.soft_bound and self.sparsity + self.mutation >= 1:
            raise UserError(
                f"sparsity {self.sparsity:g} and mutation {self.mutation:g} leave no weight: "
                "take a smaller mutation"
            )

    @property
    def needs_gradients(self) -> bool:
        """Whether an update reads gradients."""
        return super().needs_gradients or self.gradient_weight > 0

    def root_scores(self, layer: PrunableLayer, grad: Tensor | None) -> Tensor:
        """|w| + lambda |g|; with another criterion its root takes the place of |w|."""
        scores = super().root_scores(layer, grad)
        return scores if grad is None else scores + self.gradient_weight * grad.float().abs()

    def move(self, now: Update) -> tuple[Units, Units]:
        """ArgRemoveTo, then ArgGrowTo: to s + p and back to s, or (soft bound) to s and on to s - p."""
        share = self.mutation * left_at(self.mutation_schedule, now.done)
        target = self.densities_at(now, 1 - self.sparsity)
        low, high = (0.0, share) if self.soft_bound else (-share, 0.0)
        kept = now.keep(now.counts({name: max(density + low, 0.0) for name, density in target.items()}))
        counts = now.counts({name: min(density + high, 1.0) for name, density in target.items()})
        return kept, self.grow(now, kept, now.missing(kept, counts))

    def describe(self) -> str:
        """How units move, in words."""
        bound = (
            f"{self.sparsity:g} is met, and grow beyond it" if self.soft_bound else "under it, and grow back"
        )
        return (
            f"the smallest |w| + {self.gradient_weight:g} |g| go until {bound} by {self.grown}: "
            f"{100 * self.mutation:g}% of each layer, falling to 0 by {choice_name(self.mutation_schedule)}"
        )
