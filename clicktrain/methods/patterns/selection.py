"""From gradients to masks: the state and the decisions of pattern and kernel selection.

The parts are those of ClickTrain section 4 (criterion, pool, votes, kernels); `clicktrain.methods.clicktrain`
composes them over a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clicktrain.graph.prunable import PrunableLayer
from clicktrain.sparsity.allocation import LayerBudget
from clicktrain.sparsity.finalize import (
    add_pattern_votes_,
    best_patterns,
    chosen_scores,
    keep_kernels,
    keep_kernels_alike,
    pattern_mask,
)
from clicktrain.sparsity.importance import group_sum, kernel_scores
from clicktrain.sparsity.pattern_pool import (
    PatternVotes,
    add_votes,
    candidate_patterns,
    outside_candidates,
    select_pool,
)
from clicktrain.sparsity.patterns import PatternPool

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class PatternLayer:
    """A layer to be pruned, what is kept of its kernels, and what every step reads of it.

    Attributes:
        layer: the layer, before any packing.
        entries: kept positions per kernel.
        group: neighboring filters that share decisions; divides F.
        fixed_kernels: kept kernels per filter, if a setting says so.
        channel_group: filters that keep the same channels, with patterns of their own; divides F. More than
            one with a group of one alone.
        similar: whether these are filters that want similar channels, and not neighbors.
        weight: the parameter.
        shape, kernel_shape: (F, C, R, S) of the layer's view, and (R, S).
        is_view: whether the weight is its own view [F, C, R, S].
        has_patterns: whether anything is pruned inside a kernel.
        budget: the layer as allocation sees it.
    """

    layer: PrunableLayer
    entries: int
    group: int
    fixed_kernels: int | None = None
    channel_group: int = 1
    similar: bool = False
    name: str = field(init=False)
    weight: Tensor = field(init=False)
    shape: tuple[int, int, int, int] = field(init=False)
    kernel_shape: Shape = field(init=False)
    is_view: bool = field(init=False)
    has_patterns: bool = field(init=False)
    budget: LayerBudget = field(init=False)

    def __post_init__(self) -> None:
        """Derive what steps read, once."""
        weight, (f, c, r, s) = self.layer.weight, self.layer.view_shape
        budget = LayerBudget(self.layer.name, f, c, self.entries, r * s, self.fixed_kernels)
        view = self.layer.view(weight.detach())
        is_view = (view.shape, view.stride()) == (weight.shape, weight.stride())
        for name, value in (
            ("name", self.layer.name),
            ("weight", weight),
            ("shape", (f, c, r, s)),
            ("kernel_shape", (r, s)),
            ("is_view", is_view and view.data_ptr() == weight.data_ptr()),
            ("has_patterns", self.entries < r * s),
            ("budget", budget),
        ):
            object.__setattr__(self, name, value)

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as [F, C, R, S]."""
        return tensor if self.is_view else self.layer.view(tensor)

    def change_(self, change: Callable[..., None], tensor: Tensor, *args: Any) -> None:
        """Change a tensor of the weight's shape by a function (view, *args) that works in place."""
        if self.is_view:
            change(tensor, *args)
            return
        view = self.layer.view(tensor)
        change(view, *args)
        if view.data_ptr() != tensor.data_ptr():
            tensor.copy_(self.layer.unview(view))


@dataclass(slots=True)
class Selection:
    """The state of selection; each part is released by the last stage that needs it.

    Attributes:
        candidates: competitive scores of candidate patterns, per kernel shape (section 4.2).
        pools: the patterns that kernels of a shape may take.
        votes: int32 [F/G, C, P] per layer, occurrences of the best pattern (section 4.3).
        importance: [F/G, C, R, S] per layer, summed over the batches that counted.
        settling: [F/G, C, R, S] per layer, importance summed since stage 2 began, if positions outside the
            candidates go by that.
        pattern_id, kept: the decisions, [F/G, C] per layer.
        kernels: kept kernels of every filter, per layer.
    """

    candidates: dict[Shape, PatternVotes] = field(default_factory=dict)
    pools: dict[Shape, PatternPool] = field(default_factory=dict)
    votes: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)
    settling: dict[str, Tensor] = field(default_factory=dict)
    pattern_id: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    _tables: dict[tuple[Shape, torch.device], Tensor] = field(default_factory=dict, compare=False, repr=False)
    """Masks of the pools, float [P, R, S]: every step of stage 3 reads them."""

    def _table(self, layer: PatternLayer) -> Tensor:
        key = layer.kernel_shape, layer.weight.device
        if key not in self._tables:
            self._tables[key] = self.pools[layer.kernel_shape].masks().to(layer.weight.device, torch.float32)
        return self._tables[key]

    def propose(
        self,
        layer: PatternLayer,
        importance: Tensor,
        pattern_of: Callable[[Tensor, int], Tensor] = candidate_patterns,
    ) -> None:
        """Count every kernel's candidate pattern (section 4.2, steps 1 to 5), or that of another rule."""
        if layer.has_patterns:
            shape = layer.kernel_shape
            bits = pattern_of(group_sum(importance, layer.group), layer.entries)
            votes = self.candidates.get(shape) or PatternVotes.empty(bits.device)
            self.candidates[shape] = add_votes(votes, bits, shape)

    def open_positions(self, layer: PatternLayer, importance: Tensor, summed: bool) -> Tensor:
        """Positions that a kernel may yet keep: bool [F, C, R, S]; the others are Figure 6's crosses.

        Args:
            layer: one that has patterns.
            importance: [F, C, R, S] of this batch.
            summed: go by importance summed over the batches so far, not by this batch alone.
        """
        if layer.group > 1:
            importance = group_sum(importance, layer.group)
        if summed:
            finite = importance.nan_to_num(nan=0.0, posinf=0.0)  # of a batch that overflowed
            total = self.settling.get(layer.name)
            importance = self.settling[layer.name] = finite if total is None else total.add_(finite)
        mask = ~outside_candidates(importance, layer.entries)
        return mask.repeat_interleave(layer.group, dim=0) if layer.group > 1 else mask

    def close_pools(self, layers: tuple[PatternLayer, ...], size: int) -> None:
        """Keep the patterns with the highest competitive scores (section 4.2, step 6)."""
        for layer in layers:
            shape = layer.kernel_shape
            if shape in self.pools:
                continue
            if layer.has_patterns:
                self.pools[shape] = select_pool(self.candidates[shape], size, shape)
            else:
                whole = (1 << shape[0] * shape[1]) - 1
                self.pools[shape] = PatternPool.from_bits([whole], shape)

    def read(self, layer: PatternLayer, importance: Tensor, weight: Tensor, votes: bool) -> None:
        """Add one batch to the importance and, if ``votes``, let it vote for patterns (section 4.3).

        ``importance`` is [F, C, R, S]; ``weight``, 0-dim, is 0 if the batch does not count.
        """
        name = layer.name
        if layer.group > 1:
            importance = group_sum(importance, layer.group)
        total = self.importance.get(name)
        if total is None:
            total = self.importance[name] = torch.zeros_like(importance)
        if votes and layer.has_patterns:
            table = self._table(layer)
            if name not in self.votes:
                self.votes[name] = total.new_zeros(*total.shape[:2], len(table), dtype=torch.int32)
            add_pattern_votes_(self.votes[name], importance, table, weight)
        # Not a product: a rejected batch may hold infinities.
        total += torch.where(weight.to(importance.device) > 0, importance, 0.0)

    def choose_patterns(self, layer: PatternLayer, votes: bool) -> None:
        """Fix the pattern of every kernel: most votes, or highest summed importance."""
        name = layer.name
        if not layer.has_patterns:
            self.pattern_id[name] = torch.zeros_like(self.importance[name][:, :, 0, 0], dtype=torch.int64)
        elif votes:
            self.pattern_id[name] = self.votes[name].argmax(dim=-1)
        else:
            self.pattern_id[name] = best_patterns(self.importance[name], self._table(layer))

    def scores(self, layer: PatternLayer, inside_pattern: bool) -> Tensor:
        """Score of every kernel, over all its positions (Eq. 2) or inside its pattern: [F/G, C]."""
        importance = self.importance[layer.name]
        if inside_pattern:
            return chosen_scores(importance, self._table(layer), self.pattern_id[layer.name])
        return kernel_scores(importance)

    def choose_masks(
        self, layers: Sequence[PatternLayer], scores: Mapping[str, Tensor], kernels: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """Keep the best kernels of every filter, in each layer as many as ``kernels`` says (section 4.3)."""
        for layer in layers:
            own, count = scores[layer.name], kernels[layer.name]
            if layer.channel_group > 1:
                kept = keep_kernels_alike(own, count, layer.channel_group, layer.similar)
            else:
                kept = keep_kernels(own, count)
            self.kept[layer.name] = kept
            self.kernels[layer.name] = int(kept[0].sum())
        return {layer.name: self.mask(layer) for layer in layers}

    def forget_gradients(self) -> None:
        """Patterns and kernels are chosen: release what was measured to choose them."""
        self.votes, self.importance, self.settling = {}, {}, {}

    def forget_choices(self) -> None:
        """Masks are frozen and the network holds them: release patterns and kernels."""
        self.pools, self.pattern_id, self.kept, self._tables = {}, {}, {}, {}

    def mask(self, layer: PatternLayer) -> Tensor:
        """The chosen mask: bool [F, C, R, S]."""
        pool = self._table(layer).bool()
        return pattern_mask(self.pattern_id[layer.name], self.kept[layer.name], pool, layer.group)

    def pattern_counts(self, layer: PatternLayer) -> list[int]:
        """How many kept kernels took each pattern of the pool."""
        ids = self.pattern_id[layer.name][self.kept[layer.name]]
        counts = torch.bincount(ids, minlength=len(self.pools[layer.kernel_shape])) * layer.group
        return [int(n) for n in counts]
