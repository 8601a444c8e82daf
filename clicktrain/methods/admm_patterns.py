"""Pattern pruning after training by ADMM: PCONV (Ma et al., AAAI 2020) and PatDNN (Niu et al., ASPLOS 2020).

What ClickTrain compares itself with (sections 3.2 and 6): a network that is trained already gets its pattern
pool, ADMM pulls its kernels to patterns of the pool and to few kernels, both are made final, and the network
is retrained with frozen masks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from clicktrain.graph.prunable import PrunableLayers
from clicktrain.methods.base import Action, Record, RunLength
from clicktrain.methods.masks.masked import MaskState, Tensors
from clicktrain.methods.masks.own_pool import OwnPool
from clicktrain.methods.masks.projected import Projected, ProjectedState
from clicktrain.methods.patterns.selection import Selection
from clicktrain.methods.patterns.voting import close_pools
from clicktrain.runs.events import FinalizedEvent
from clicktrain.sparsity.importance import magnitude_importance
from clicktrain.sparsity.pattern_pool import candidate_patterns, natural_patterns
from clicktrain.sparsity.pattern_units import PatternUnit
from clicktrain.sparsity.patterns import PatternPool
from clicktrain.sparsity.units import UnitChoice


@dataclass(slots=True)
class PatternState(ProjectedState):
    """The state of ADMM, and the pools."""

    pools: dict[tuple[int, int], PatternPool] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AdmmPatterns(OwnPool, Projected):
    """Prune a trained network by patterns with ADMM, then retrain it (PCONV and PatDNN, 2020)."""

    name: ClassVar[str] = "admm-patterns"
    title: ClassVar[str] = "ADMM patterns"
    reason: ClassVar[str] = "each filter of a layer keeps as many whole kernels"

    granularity: UnitChoice = "pattern"
    """What is pruned as one: kernels that keep a pattern each, or whole kernels, or single weights (Zhang et
    al. 2018)."""
    pool: Literal["natural", "dynamic", "fixed"] = "natural"
    """Pattern pool: the most frequent natural patterns of the trained weights (PatDNN), which are a kernel's
    center and its largest other weights; ClickTrain's candidates (section 4.2), by magnitude; or 4, 8, 12 or
    16 fixed 3x3 patterns."""
    patterns: int = 12
    """Size N of the pattern pool (8 in PatDNN, 8 or 12 in ClickTrain)."""

    @property
    def expects_trained(self) -> bool:
        """It prunes after training."""
        return True

    def pools_of(self, state: MaskState) -> Mapping[tuple[int, int], PatternPool]:
        """The pools of the trained weights."""
        assert isinstance(state, PatternState)
        return state.pools

    def new_state(self) -> PatternState:
        """A state before the first step."""
        return PatternState(stage="admm")

    def at_start(self, state: MaskState, prunable: PrunableLayers, length: RunLength) -> Sequence[Action]:
        """Choose the pools, then begin."""
        assert isinstance(state, PatternState)
        actions: list[Action] = []
        if layers := self.pattern_layers(prunable) if self.granularity == "pattern" else ():
            selection = Selection()
            for layer in layers if self.fixed is None else ():
                weight = layer.view(layer.weight.detach().float())
                rule = natural_patterns if self.pool == "natural" else candidate_patterns
                selection.propose(layer, magnitude_importance(weight, weight), rule)
            actions.append(Record(close_pools(selection, layers, self.patterns, self.fixed)))
            state.pools = selection.pools
        return [*actions, *super().at_start(state, prunable, length)]

    def fix(
        self, state: MaskState, prunable: PrunableLayers, reason: str, masks: Tensors | None = None
    ) -> list[Action]:
        """Freeze the masks, and say which patterns there are."""
        if state.stage == "fixed":
            return []
        masks = self.last_masks(state, prunable) if masks is None else masks
        chosen = [self._chosen(state, prunable, masks)] if self.granularity == "pattern" else []
        return [*chosen, *super().fix(state, prunable, reason, masks)]

    def _chosen(self, state: MaskState, prunable: PrunableLayers, masks: Tensors) -> Action:
        """What was chosen of each convolution, as ClickTrain records it."""
        rows: list[dict[str, Any]] = []
        for layer in prunable.convs:
            mask, unit = layer.view(masks[layer.name]), self.unit_at(state, layer)
            kept, counts = mask.flatten(2).any(dim=2), []
            if isinstance(unit, PatternUnit):
                counts = torch.bincount(unit.ids(mask)[kept], minlength=len(unit.pool)).tolist()
            kernels, nonzero, filters = int(kept.sum()), int(mask.sum()), mask.shape[0]
            rows.append(
                {
                    "name": layer.name,
                    "shape": list(mask.shape),
                    "kernels_per_filter": kernels / filters if kernels % filters else kernels // filters,
                    "nnz_per_filter": nonzero / filters if nonzero % filters else nonzero // filters,
                    "density": nonzero / math.prod(mask.shape),
                    "pattern_counts": counts,
                }
            )
        nonzero = sum(int(masks[layer.name].sum()) for layer in prunable.counted)
        return Record(
            FinalizedEvent(
                compression_asked=self.compression_asked,
                compression_reached=prunable.conv_weights / max(nonzero + prunable.other_conv_weights, 1),
                layers=rows,
            )
        )

    def after_freeze(self, state: MaskState, masks: Mapping[str, Tensor]) -> None:
        """The network holds masks and patterns."""
        assert isinstance(state, PatternState)
        super().after_freeze(state, masks)
        state.pools = {}
