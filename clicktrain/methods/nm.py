"""N:M sparsity from scratch by SR-STE (Zhou et al., ICLR 2021)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayer, PrunableLayers
from clicktrain.methods.base import LayerPlan, PruningPlan, RunLength
from clicktrain.methods.masks.masked import MaskState, leave_alone
from clicktrain.methods.masks.straight_through import StraightThrough
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.units import best_of_each_group


@dataclass(frozen=True, kw_only=True)
class NM(StraightThrough):
    """Keep N of M neighboring input channels by SR-STE (Zhou et al., 2021).

    The forward pass sees the N largest of each group. The optimizer moves all weights by the gradient of what
    the pass saw (straight-through), with their momentum and weight decay, and a term lambda * w pulls those
    that it did not see towards zero. Between steps the network holds the masked weights, the state the rest.
    """

    name: ClassVar[str] = "nm"
    title: ClassVar[str] = "N:M (SR-STE)"

    n: int = 2
    """Weights that stay of each group."""
    m: int = 4
    """Neighboring input channels that are a group; layers whose channels it does not divide stay dense."""
    sparsity: float | None = None  # type: ignore[assignment]
    """Share of the pruned layers' weights that is zero: 1 - n / m, which need not be given."""

    def __post_init__(self) -> None:
        """Check every setting."""
        if not 1 <= self.n < self.m:
            raise UserError(f"n and m have to be 1 <= n < m, as 2 and 4, not {self.n} and {self.m}")
        given, share = self.sparsity, 1 - self.n / self.m
        if given is not None and abs(given - share) > 1e-3:
            raise UserError(
                f"sparsity is {given:g}, but {self.n}:{self.m} is {share:g}: leave it out, or choose "
                "n and m to match"
            )
        object.__setattr__(self, "sparsity", share)
        super().__post_init__()
        if not 0 <= self.decay < math.inf or not 0 < self.stop <= 1:
            raise UserError(
                "decay must not be negative, and stop is a share of the run, above 0 and at most 1"
            )

    def find_prunable(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> PrunableLayers:
        """Layers whose input channels (per group of the convolution) are divided by m."""
        prunable = super().find_prunable(model, trained)
        odd = {layer.name: layer.view_shape[1] for layer in prunable.layers if layer.view_shape[1] % self.m}
        return leave_alone(prunable, {name: f"{c} inputs are {self._odd}" for name, c in odd.items()})

    @property
    def _odd(self) -> str:
        return f"no multiple of {self.m}"

    def init(self, prunable: PrunableLayers, length: RunLength) -> MaskState:
        """Warn where n:m fits less than half of the layers that could be pruned, or of their weights."""
        odd = [math.prod(shape) for shape, why in prunable.left_alone.values() if why.endswith(self._odd)]
        fit = [layer.weight.numel() for layer in prunable.layers]
        if fit and (sum(fit) < sum(odd) or len(fit) < len(odd)):
            have = "has" if len(fit) == 1 else "have"
            warnings.warn(
                f"{len(fit)} of {len(fit) + len(odd)} layers {have} a multiple of {self.m} input channels: "
                f"the others, {sum(odd) / (sum(odd) + sum(fit)):.0%} of the weights, stay dense",
                stacklevel=4,
            )
        return super().init(prunable, length)

    def choose(self, layer: PrunableLayer, scores: Tensor) -> Tensor:
        """The n best of every m input channels, at each position of each filter."""
        return layer.unview(best_of_each_group(layer.view(scores), self.n, self.m))

    def plan(
        self, prunable: PrunableLayers, length: RunLength, state: MaskState | None = None
    ) -> PruningPlan:
        """Per layer: n of m, or what was reached."""
        what = f"{self.n} of {self.m}"
        rows = [LayerPlan(layer.name, layer.shape, what, self.n / self.m) for layer in prunable.layers]
        until = f"until batch {self.frozen_at(length)} of {length.total}"
        by = f"{what} input channels by {choice_name(self.criterion)}, chosen at every step"
        stages = [("stage 1 dynamic", f"{until}: {by}"), ("stage 2 fixed", "to the end, masks frozen")]
        return self.show(prunable, state, rows, stages)
