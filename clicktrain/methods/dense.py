"""The baseline: no pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from clicktrain.graph.prunable import PrunableLayers
from clicktrain.methods.base import LayerPlan, Method, PruningPlan, RunLength, plan_rows


@dataclass(frozen=True, kw_only=True)
class Dense(Method[None]):
    """Plain training, the baseline."""

    name: ClassVar[str] = "dense"
    title: ClassVar[str] = "dense"
    freezes: ClassVar[bool] = False
    prunes: ClassVar[bool] = False
    contract_exempt: ClassVar[Mapping[str, str]] = MappingProxyType({"target": "it is asked for nothing"})

    def init(self, prunable: PrunableLayers, length: RunLength) -> None:
        """No state."""

    def plan(self, prunable: PrunableLayers, length: RunLength, state: None = None) -> PruningPlan:
        """Nothing is pruned."""
        rows = [
            LayerPlan(layer.name, layer.shape, "none", 1.0, reason="dense run") for layer in prunable.convs
        ]
        return PruningPlan(plan_rows(prunable, rows), "dense training: nothing is pruned")
