"""GraNet: gradual pruning with zero-cost neuroregeneration (Liu et al., NeurIPS 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from clicktrain.errors import UserError
from clicktrain.methods.masks.growing import Growing
from clicktrain.methods.masks.moving import Gradual
from clicktrain.methods.masks.update_times import check_shares
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.regrowth import DROPS, DropChoice, Units, Update, best_of_network
from clicktrain.sparsity.schedules import ScheduleChoice, left_at


@dataclass(frozen=True, kw_only=True)
class GraNet(Gradual, Growing):
    """Prune gradually, regrow by gradient at each step (GraNet, 2021).

    A pruning step takes the smallest of the whole network until the schedule's sparsity is met. Then, in each
    layer, a share of the smallest survivors goes and as many grow where the gradient is largest.
    """

    name: ClassVar[str] = "granet"
    title: ClassVar[str] = "GraNet"

    initial_sparsity: float = 0.0
    """At the first step: 0 is dense-to-sparse training, 0.5 the paper's sparse-to-sparse training."""
    drop: float = 0.5
    """Share of each layer's weights that is replaced at the first step."""
    drop_rule: DropChoice = "layer"
    """Which are replaced: the smallest of each layer (the paper's), of the whole network, or what is below an
    adaptive threshold."""
    drop_schedule: ScheduleChoice = "cosine"
    """How that share falls to 0 until the last step."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        check_shares(self, ("drop",))
        if not 0 <= self.initial_sparsity <= self.sparsity:
            raise UserError(f"initial_sparsity must be between 0 and sparsity, not {self.initial_sparsity}")

    @property
    def first_sparsity(self) -> float:
        """At the first step."""
        return self.initial_sparsity

    @property
    def decided_by(self) -> str:
        """Weights compete over all layers."""
        return "what survives in the whole network"

    def move(self, now: Update) -> tuple[Units, Units]:
        """Prune the network to the schedule's sparsity, then replace a share in each layer."""
        left = left_at(self.sparsity_schedule, now.done)
        sparsity = self.sparsity - (self.sparsity - self.initial_sparsity) * left
        total = sum(math.prod(shape) for shape in now.shapes.values())
        alive = best_of_network(now, min(round((1 - sparsity) * total), now.weights(now.alive)))
        if now.done >= 1:
            return alive, alive  # nothing is replaced, and no gradient was read
        pruned = replace(now, alive=alive)
        kept = DROPS.resolve(self.drop_rule)(pruned, self.drop * left_at(self.drop_schedule, now.done))
        return kept, self.grow(pruned, kept, pruned.lost(kept))

    def describe(self) -> str:
        """How units move, in words."""
        rise, fall = choice_name(self.sparsity_schedule), choice_name(self.drop_schedule)
        return (
            f"{self.initial_sparsity:g} to {self.sparsity:g} by a {rise} schedule over all layers; "
            f"{100 * self.drop:g}% of each layer, falling to 0 by {fall}, are replaced by {self.grown}"
        )
