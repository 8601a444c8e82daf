"""From gradients to masks: the state and the decisions of pattern and kernel selection.

The parts are those of ClickTrain section 4 (criterion, pool, votes, kernels) and allocation over layers; how
they are composed over a run is `clicktrain.methods.clicktrain`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clicktrain.graph.prunable import ConvLayer
from clicktrain.sparsity.allocation import LayerBudget, kernel_gains
from clicktrain.sparsity.finalize import (
    add_pattern_votes_,
    best_patterns,
    chosen_scores,
    keep_kernels,
    pattern_mask,
)
from clicktrain.sparsity.importance import group_sum, kernel_scores
from clicktrain.sparsity.pattern_pool import PatternVotes, add_votes, candidate_patterns, select_pool
from clicktrain.sparsity.patterns import PatternPool

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A layer to be pruned and what is kept of a kernel in it."""

    layer: ConvLayer
    entries: int
    group: int
    fixed_kernels: int | None = None

    @property
    def kernel_shape(self) -> Shape:
        """(R, S)."""
        return self.layer.shape[2], self.layer.shape[3]

    @property
    def has_patterns(self) -> bool:
        """Whether anything is pruned inside a kernel."""
        return self.entries < self.kernel_shape[0] * self.kernel_shape[1]

    @property
    def budget(self) -> LayerBudget:
        """The layer as allocation sees it."""
        f, c, r, s = self.layer.shape
        return LayerBudget(self.layer.name, f, c, self.entries, r * s, self.fixed_kernels)


def effective_group(filters: int, group: int) -> int:
    """Filters that share decisions: the largest common divisor of the layer's filters and ``group``."""
    return math.gcd(filters, group)


@dataclass(slots=True)
class Selection:
    """All that selection remembers: tensors per layer and per kernel shape.

    candidates: competitive scores of candidate patterns, per kernel shape (section 4.2).
    pools: the patterns that kernels of a shape may take.
    votes: int32 [F/G, C, P] per layer, occurrences of the best pattern (section 4.3).
    importance: [F/G, C, R, S] per layer, summed over the batches that counted.
    pattern_id, kept: the decisions, [F/G, C] per layer.
    kernels: kept kernels of every filter, per layer.

    Each is released by the stage that needs it last.
    """

    candidates: dict[Shape, PatternVotes] = field(default_factory=dict)
    pools: dict[Shape, PatternPool] = field(default_factory=dict)
    votes: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    pattern_id: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)

    def propose(self, target: Target, importance: Tensor) -> None:
        """Count every kernel's candidate pattern (section 4.2, steps 1 to 5)."""
        if target.has_patterns:
            shape = target.kernel_shape
            bits = candidate_patterns(group_sum(importance, target.group), target.entries)
            votes = self.candidates.get(shape, PatternVotes.empty(bits.device))
            self.candidates[shape] = add_votes(votes, bits, shape)

    def close_pools(self, targets: tuple[Target, ...], size: int) -> None:
        """Keep the patterns with the highest competitive scores (section 4.2, step 6)."""
        for target in targets:
            shape = target.kernel_shape
            if shape in self.pools:
                continue
            if target.has_patterns:
                self.pools[shape] = select_pool(self.candidates[shape], size, shape)
            else:
                whole = (1 << shape[0] * shape[1]) - 1
                self.pools[shape] = PatternPool.from_bits([whole], shape)

    def vote(self, target: Target, importance: Tensor, weight: Tensor) -> None:
        """Let one batch vote for patterns and add to the importance (section 4.3)."""
        name = target.layer.name
        importance = group_sum(importance, target.group)
        if name not in self.importance:
            self.importance[name] = torch.zeros_like(importance)
            f, c = importance.shape[:2]
            counts = torch.zeros(f, c, len(self.pools[target.kernel_shape]), dtype=torch.int32)
            self.votes[name] = counts.to(importance.device)
        if target.has_patterns:
            masks = self.pools[target.kernel_shape].masks()
            add_pattern_votes_(self.votes[name], importance, masks, weight)
        # Not a product: a rejected batch may hold infinities.
        self.importance[name] += torch.where(weight.to(importance.device) > 0, importance, 0.0)

    def choose_patterns(self, target: Target, by_votes: bool) -> None:
        """Fix the pattern of every kernel: most votes, or highest summed importance."""
        name = target.layer.name
        if by_votes:
            self.pattern_id[name] = self.votes[name].argmax(dim=-1)
        else:
            masks = self.pools[target.kernel_shape].masks()
            self.pattern_id[name] = best_patterns(self.importance[name], masks)

    def scores(self, target: Target, inside_pattern: bool) -> Tensor:
        """Score of every kernel, over all its positions (Eq. 2) or inside its pattern: [F/G, C]."""
        name = target.layer.name
        if inside_pattern:
            masks = self.pools[target.kernel_shape].masks()
            return chosen_scores(self.importance[name], masks, self.pattern_id[name])
        return kernel_scores(self.importance[name])

    def choose_kernels(self, target: Target, scores: Tensor, kernels: int) -> None:
        """Keep the best ``kernels`` of every filter (section 4.3)."""
        kept = self.kept[target.layer.name] = keep_kernels(scores, kernels)
        self.kernels[target.layer.name] = int(kept[0].sum())

    def forget_gradients(self) -> None:
        """Patterns and kernels are chosen: release what was measured to choose them."""
        self.votes, self.importance = {}, {}

    def forget_choices(self) -> None:
        """Masks are frozen and the network holds them: release patterns and kernels."""
        self.pools, self.pattern_id, self.kept = {}, {}, {}

    def mask(self, target: Target) -> Tensor:
        """The decided mask: bool [F, C, R, S]."""
        name = target.layer.name
        pool = self.pools[target.kernel_shape].masks()
        return pattern_mask(self.pattern_id[name], self.kept[name], pool, target.group)

    def pattern_counts(self, target: Target) -> list[int]:
        """How many kept kernels took each pattern of the pool."""
        name = target.layer.name
        ids = self.pattern_id[name][self.kept[name]]
        counts = torch.bincount(ids, minlength=len(self.pools[target.kernel_shape])) * target.group
        return [int(n) for n in counts]

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors, numbers and strings."""
        return {
            "candidates": {_key(k): {"bits": v.bits, "counts": v.counts} for k, v in self.candidates.items()},
            "pools": {_key(k): [p.bits for p in v.patterns] for k, v in self.pools.items()},
            "votes": dict(self.votes),
            "importance": dict(self.importance),
            "pattern_id": dict(self.pattern_id),
            "kept": dict(self.kept),
            "kernels": dict(self.kernels),
        }

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any], device: torch.device) -> Selection:
        """Inverse of `state_dict`."""

        def moved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}

        return cls(
            {
                _shape(k): PatternVotes(v["bits"].to(device, copy=True), v["counts"].to(device, copy=True))
                for k, v in saved["candidates"].items()
            },
            {_shape(k): PatternPool.from_bits(v, _shape(k)) for k, v in saved["pools"].items()},
            moved(saved["votes"]),
            moved(saved["importance"]),
            moved(saved["pattern_id"]),
            moved(saved["kept"]),
            # States of older versions have only the kept kernels themselves.
            dict(saved.get("kernels", {name: int(kept[0].sum()) for name, kept in saved["kept"].items()})),
        )


def _key(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def _shape(key: str) -> Shape:
    r, s = key.split("x")
    return int(r), int(s)


def allocation_gains(
    targets: tuple[Target, ...], scores: Mapping[str, Tensor], rule: str
) -> dict[str, Tensor] | None:
    """Worth of every further kernel per layer, for `clicktrain.sparsity.allocation.allocate`.

    Rules: ``"uniform"`` equal densities (None); ``"importance"`` the measured scores as they are, as a
    first-order Taylor estimate compares over layers; ``"relative"`` the scores over their layer's mean;
    ``"share"`` the scores over their layer's sum, so that every layer is worth the same as a whole;
    ``"erk"`` densities in proportion to (F + C + R + S) / (F C R S) (Evci et al. 2020, RigL, section 3).
    """
    if rule == "uniform":
        return None
    gains: dict[str, Tensor] = {}
    if rule == "erk":
        for target in targets:
            f, c, r, s = target.layer.shape
            ks = torch.arange(1, c + 1, dtype=torch.float64)
            density = (ks - 0.5) * target.entries / (c * r * s)
            scale = (f + c + r + s) / (f * c * r * s)
            gains[target.layer.name] = -density / scale * target.budget.price
        return gains
    if rule not in ("importance", "relative", "share"):
        raise ValueError(f"unknown allocation rule {rule!r}")
    for target in targets:
        own = kernel_gains(scores[target.layer.name], normalise=rule != "importance")
        # Scores of a group are sums over its filters; relative to their mean they are not any more.
        if rule == "relative":
            own = own * target.group
        elif rule == "share":
            own = own / scores[target.layer.name].numel()
        gains[target.layer.name] = own
    return gains
