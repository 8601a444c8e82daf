"""What stages 2 and 3 of ClickTrain read from gradients, and the pools (sections 4.2 and 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from clicktrain.methods.contract import StepInfo
from clicktrain.methods.patterns.selection import PatternLayer, Selection
from clicktrain.runs.events import PoolEvent
from clicktrain.sparsity.importance import Criterion, magnitude_importance
from clicktrain.sparsity.patterns import PatternPool


def read_batch(
    selection: Selection,
    layers: Sequence[PatternLayer],
    step: StepInfo,
    criterion: Criterion,
    weight: Tensor | None,
    votes: bool,
    early: Literal["none", "batch", "summed"] = "none",
) -> dict[str, Tensor]:
    """Let one batch propose patterns for the pools (``weight`` None), or vote for those of the pools.

    Args:
        selection: changed in place.
        layers: those without a gradient are passed over.
        step: the step whose gradients are read.
        criterion: of single weights.
        weight: 0-dim, 1 if the batch counts in the vote and 0 if not; None: it proposes.
        votes: count votes, beside the importance that is summed.
        early: which positions a kernel may yet keep, to return: by this batch, by importance summed over the
            batches so far, or none.

    Returns:
        Layer -> bool [F, C, R, S], False = settled, for layers that have patterns.
    """
    masks = {}
    for layer in layers:
        grad = step.gradient(layer.weight)
        if grad is None:
            continue
        importance = criterion(layer.weight.detach().float(), grad.float())
        if not layer.is_view:
            importance = layer.view(importance)
        if weight is None:
            selection.propose(layer, importance)
        else:
            selection.read(layer, importance, weight, votes)
        if early != "none" and layer.has_patterns:
            masks[layer.name] = selection.open_positions(layer, importance, early == "summed")
    return masks


def fill_in(
    selection: Selection, layers: Sequence[PatternLayer], votes: bool, pool: bool, finalize: bool
) -> None:
    """Let layers without gradients so far take part by their magnitudes, before a stage ends.

    ``pool`` and ``finalize`` say which of the two stages is about to end.
    """
    proposed = set(selection.candidates)
    for layer in layers:
        propose = pool and layer.kernel_shape not in proposed
        read = finalize and layer.name not in selection.importance
        if not (propose or read):
            continue
        weight = layer.view(layer.weight.detach().float())
        importance = magnitude_importance(weight, weight)
        if propose:
            selection.propose(layer, importance)
        else:
            selection.read(layer, importance, weight.new_ones(()), votes)


def close_pools(
    selection: Selection, layers: tuple[PatternLayer, ...], size: int, fixed: PatternPool | None
) -> PoolEvent:
    """Decide the pools, of the patterns proposed most or as given for 3x3 kernels; what to record."""
    if fixed is not None:
        selection.pools[3, 3] = fixed
    selection.close_pools(layers, size)
    pools = []
    for shape, pool in selection.pools.items():
        votes = selection.candidates.get(shape)
        score = {} if votes is None else dict(zip(votes.bits.tolist(), votes.counts.tolist(), strict=True))
        patterns = [{"bits": p.bits, "score": score.get(p.bits)} for p in pool.patterns]
        pools.append({"shape": list(shape), "patterns": patterns, "candidates": len(score)})
    selection.candidates = {}
    return PoolEvent(pools=pools)
