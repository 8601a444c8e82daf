"""From scores and a threshold to the masks of a whole network: Campfire's granularities, layer by layer.

When the threshold rises, and what the scores are, is `clicktrain.methods.campfire`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from clicktrain.graph.prunable import ConvLayer, LinearLayer, PrunableLayers
from clicktrain.sparsity.fully_connected import linear_mask, num_blocks, silent_inputs
from clicktrain.sparsity.granularity import (
    Cut,
    Shape,
    Within,
    ck_cut,
    combined_cut,
    cut_mask,
    inter_epoch_cut,
    num_pruned,
    window_cut,
)
from clicktrain.sparsity.pattern_pool import PatternVotes, add_votes, candidate_patterns, select_pool
from clicktrain.sparsity.patterns import default_entries

Granularity = Literal["window", "ck", "combined", "inter_epoch", "pattern"]
Linear = Literal["fine", "block", "none"]
PoolKey: TypeAlias = tuple[int, int, int]
"""R, S and positions pruned in a kernel: patterns of one pool have one shape and one number of entries."""


@dataclass(frozen=True, slots=True)
class MaskRule:
    """What goes at a threshold; settings as in `clicktrain.methods.campfire.Campfire`.

    ``ck_threshold`` is where inter-epoch pruning changes from kernels to windows, ``block`` the side of the
    blocks of fully connected layers, None for single weights.
    """

    granularity: Granularity
    within: Within
    window_share: float
    max_non_zero: int | None
    patterns: int
    ck_threshold: float
    block: int | None

    def cut(self, shape: Shape, threshold: float) -> Cut:
        """How much of a convolution goes; kernels of one position fall under CK (section 2.1)."""
        most = None
        if self.max_non_zero is not None:
            most = default_entries(shape[2:], self.max_non_zero)
        if self.granularity == "ck" or shape[2:] == (1, 1):
            return ck_cut(shape, threshold, self.within)
        if self.granularity == "window":
            return window_cut(shape, threshold, most)
        if self.granularity == "inter_epoch":
            return inter_epoch_cut(shape, threshold, self.ck_threshold, self.within)
        return combined_cut(shape, threshold, self.within, self.window_share, most)

    def masks(
        self, prunable: PrunableLayers, scores: Mapping[str, Tensor], threshold: float
    ) -> dict[str, Tensor]:
        """Masks of all layers.

        Args:
            prunable: the layers.
            scores: layer name -> [F, C, R, S] or [O, I], not negative, larger = keep.
            threshold: share that is to go.

        Returns:
            layer name -> bool of the same shape, True = kept.
        """
        cuts = {layer.name: self.cut(layer.view_shape, threshold) for layer in prunable.convs}
        pools = self._pools(scores, cuts) if self.granularity == "pattern" else {}
        masks = {}
        for name, cut in cuts.items():
            r, s = scores[name].shape[2:]
            masks[name] = cut_mask(scores[name], cut, self.within, pools.get((r, s, cut.positions)))
        for layer in prunable.linears:
            before = masks.get(layer.source or "")
            silent = None if before is None else silent_inputs(before, layer.view_shape[1])
            # Roots: the paper sums |w| over blocks, not w^2; single weights rank the same.
            masks[layer.name] = linear_mask(scores[layer.name].sqrt(), threshold, self.block, silent)
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
        return {key: select_pool(prunable, self.patterns, key[:2]).masks() for key, prunable in votes.items()}

    def describe(self, layer: ConvLayer | LinearLayer, threshold: float) -> tuple[str, float, str]:
        """In words what goes of a layer, the sparsity that this makes without ties, and a remark."""
        if layer.kind == "linear":
            remark = f", without inputs from dead filters of {layer.source}" if layer.source else ""
            if layer.untraced:
                remark = (
                    f", inputs from dead filters stay: torch.fx cannot trace this network ({layer.untraced})"
                )
            if self.block is None:
                weights = layer.weight.numel()
                return "weights", num_pruned(weights, threshold) / weights, remark
            blocks = num_blocks(layer.view_shape[:2], self.block)
            return f"{self.block}x{self.block} blocks", num_pruned(blocks, threshold) / blocks, remark
        shape = layer.view_shape
        cut, size = self.cut(shape, threshold), shape[2] * shape[3]
        inside = "pattern of " if self.granularity == "pattern" else ""
        parts = [f"{inside}{size - cut.positions} of {size}"] if cut.positions else []
        parts += [f"kernels by {self.within}"] if cut.kernels else []
        return " + ".join(parts) or "none", cut.sparsity(shape, self.within), ""
