"""Campfire: masks by magnitude over a pruning era early in training, then frozen masks (sections 2, A).

Inside the era the mask is chosen after every step at the threshold of Eq. (1). A pruned weight is zero in
every forward pass and gets its gradient, so that a step may bring it back among the large ones: this is
Algorithm 2. Section 2 also says that a zero stays zero "for the rest of the training period": see ``regrow``.
An era that begins with the run masks the initial weights, before the first step. An era that ends where it
begins prunes once: at the very start that is pruning after training (of weights trained elsewhere), or a
fixed random network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayers
from clicktrain.methods.base import LayerPlan, PruningPlan, RunLength
from clicktrain.methods.masks.masked import MaskState
from clicktrain.methods.masks.rising import Rising
from clicktrain.sparsity.registry import choice_name


@dataclass(frozen=True, kw_only=True)
class Campfire(Rising):
    """Prune windows and kernels over an early era (Campfire, 2020)."""

    name: ClassVar[str] = "campfire"
    title: ClassVar[str] = "Campfire"
    reason: ClassVar[str] = "whole kernels, positions and blocks are pruned"

    sparsity: float = 0.6
    """Share of each pruned layer's weights that is zero at the end (the threshold; true sparsity may be
    higher, as kernels and filters are whole numbers)."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        self.check_cuts()
        self.check_structure()
        self.check_loss_slope()
        self.check_era(self.sparsity)
        if not 0 <= self.window_share < 1:
            raise UserError(f"window_share must be at least 0 and below 1, not {self.window_share}")
        if not 0 <= self.gradient_memory < 1:
            raise UserError(f"gradient_memory must be at least 0 and below 1, not {self.gradient_memory}")

    @property
    def expects_trained(self) -> bool:
        """Pruning after training needs a network that has been trained."""
        return self.preset == "after-training"

    @property
    def prunes_linear(self) -> bool:
        """Whether linear layers are pruned too."""
        return self.linear != "none"

    def plan(
        self, prunable: PrunableLayers, length: RunLength, state: MaskState | None = None
    ) -> PruningPlan:
        """Per layer: what is pruned, target and true sparsity; what was decided once it is."""
        rows = []
        for layer in prunable.layers:
            what, sparsity, note = self.describe_cut(layer, self.sparsity, self.ck_threshold)
            if state is not None and layer.name in state.kept:
                sparsity = 1 - state.kept[layer.name][0] / math.prod(layer.shape)
            why = f"target sparsity {self.sparsity:.3f}, true {sparsity:.3f}{note}"
            rows.append(LayerPlan(layer.name, layer.shape, what, 1 - sparsity, None, why))
        dense, era = self.describe_era(self.sparsity, self.stable_from, length)
        how = f"{choice_name(self.granularity)} by {choice_name(self.criterion)}"
        back = "weights may come back" if self.regrow else "zeros stay"
        stages = [("stage 1 dense", dense), ("stage 2 era", f"{era}, {how}, {back}"),
                  ("stage 3 fixed", "to the end, masks frozen")]  # fmt: skip
        return self.show(prunable, state, rows, stages)
