"""From scores and a threshold to the masks of a whole network: Campfire's granularities, layer by layer.

When the threshold rises is `clicktrain.methods.masks.era`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayer, PrunableLayers
from clicktrain.sparsity.fully_connected import MAX_BLOCK, linear_mask, num_blocks, silent_inputs
from clicktrain.sparsity.granularity import (
    GRANULARITIES,
    Cut,
    CutRule,
    GranularityChoice,
    Shape,
    Within,
    cut_mask,
    cut_of,
    num_pruned,
)
from clicktrain.sparsity.pattern_pool import PatternVotes, add_votes, candidate_patterns, select_pool
from clicktrain.sparsity.patterns import default_entries

PoolKey: TypeAlias = tuple[int, int, int]
"""R, S and positions pruned in a kernel: patterns of one pool have one shape and one number of entries."""


@dataclass(frozen=True, kw_only=True)
class CutSettings:
    """What goes at a threshold, of convolutions and of linear layers."""

    granularity: GranularityChoice = "combined"
    """What goes: the smallest of each kernel, whole kernels, both, both one after the other, or all but a
    pattern of each kernel and then whole kernels."""
    within: Within = "channel"
    """Whole kernels compete within an input channel (Algorithm 1), or within a filter, so that all filters
    keep equally many."""
    max_non_zero: int | None = None
    """At most this many of the 9 weights of a 3x3 kernel stay as soon as the threshold is above 0 (window,
    combined, pattern); other kernel sizes keep the same share."""
    window_share: float = 0.8
    """Share of the threshold that is pruned inside kernels (combined, pattern)."""
    patterns: int = 8
    """Size of the pattern pool per kernel shape (pattern)."""
    linear: Literal["fine", "block", "none"] = "fine"
    """Fully connected layers: single weights over the layer, blocks, or left dense."""
    block: int = 4
    """Side of the blocks of fully connected layers."""

    def check_cuts(self) -> None:
        """UserError for a value out of range."""
        if not 1 <= self.block <= MAX_BLOCK:
            raise UserError(f"block must be 1 to {MAX_BLOCK}, not {self.block}")
        if self.max_non_zero is not None and not 1 <= self.max_non_zero <= 9:
            raise UserError(
                f"max_non_zero is a number of weights of a 3x3 kernel, 1 to 9, not {self.max_non_zero}"
            )
        if self.patterns < 1:
            raise UserError(f"patterns must be at least 1, not {self.patterns}")

    def cut(self, shape: Shape, threshold: float, ck_threshold: float) -> Cut:
        """How much of a convolution goes.

        ``ck_threshold`` is where inter-epoch pruning changes from kernels to windows.
        """
        most = None if self.max_non_zero is None else default_entries(shape[2:], self.max_non_zero)
        rule = CutRule(self.within, self.window_share, most, ck_threshold)
        return cut_of(self.granularity, shape, threshold, rule)

    @property
    def in_patterns(self) -> bool:
        """Whether what stays of a kernel is a pattern."""
        return bool(getattr(GRANULARITIES.resolve(self.granularity), "in_patterns", False))

    @property
    def block_side(self) -> int | None:
        """Side of the blocks of linear layers, None for single weights."""
        return self.block if self.linear == "block" else None

    def masks(
        self, prunable: PrunableLayers, scores: Mapping[str, Tensor], threshold: float, ck_threshold: float
    ) -> dict[str, Tensor]:
        """Masks of all layers, bool of the weights' shapes, at a threshold.

        Scores have the same shapes, are not negative, larger = keep. ``ck_threshold``: see `cut`.
        """
        cuts = {layer.name: self.cut(layer.view_shape, threshold, ck_threshold) for layer in prunable.convs}
        views = {layer.name: layer.view(scores[layer.name]) for layer in prunable.convs}
        pools = self._pools(views, cuts) if self.in_patterns else {}
        seen, masks = {}, {}
        for layer in prunable.convs:
            view, cut = views[layer.name], cuts[layer.name]
            pool = pools.get((view.shape[2], view.shape[3], cut.positions))
            seen[layer.name] = cut_mask(view, cut, self.within, pool)
            masks[layer.name] = layer.unview(seen[layer.name])
        for layer in prunable.linears:
            before = seen.get(layer.source or "")
            silent = None if before is None else silent_inputs(before, layer.view_shape[1])
            # Roots: the paper sums |w| over blocks, not w^2; single weights rank the same.
            masks[layer.name] = linear_mask(scores[layer.name].sqrt(), threshold, self.block_side, silent)
        return masks

    def _pools(self, scores: Mapping[str, Tensor], cuts: Mapping[str, Cut]) -> dict[PoolKey, Tensor]:
        """The patterns that most kernels of the network propose (ClickTrain section 4.2)."""
        votes: dict[PoolKey, PatternVotes] = {}
        for name, cut in cuts.items():
            r, s = scores[name].shape[2:]
            if cut.positions > 0:
                bits = candidate_patterns(scores[name], r * s - cut.positions)
                key = (r, s, cut.positions)
                votes[key] = add_votes(votes.get(key, PatternVotes.empty(bits.device)), bits, (r, s))
        return {key: select_pool(each, self.patterns, key[:2]).masks() for key, each in votes.items()}

    def describe_cut(
        self, layer: PrunableLayer, threshold: float, ck_threshold: float
    ) -> tuple[str, float, str]:
        """In words what goes of a layer, the sparsity that this makes without ties, and a remark."""
        if layer.kind == "linear":
            remark = f", without inputs from dead filters of {layer.source}" if layer.source else ""
            if layer.untraced:
                remark = (
                    f", inputs from dead filters stay: torch.fx cannot trace this network ({layer.untraced})"
                )
            if self.block_side is None:
                weights = layer.weight.numel()
                return "weights", num_pruned(weights, threshold) / weights, remark
            blocks = num_blocks(layer.view_shape[:2], self.block)
            return f"{self.block}x{self.block} blocks", num_pruned(blocks, threshold) / blocks, remark
        shape = layer.view_shape
        cut, size = self.cut(shape, threshold, ck_threshold), shape[2] * shape[3]
        inside = "pattern of " if self.in_patterns else ""
        parts = [f"{inside}{size - cut.positions} of {size}"] if cut.positions else []
        parts += [f"kernels by {self.within}"] if cut.kernels else []
        return " + ".join(parts) or "none", cut.sparsity(shape, self.within), ""
