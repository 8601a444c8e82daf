"""The early pruning indicator for methods that prune kernels: is it stable how many each layer keeps?

When to Prune? counts neurons; here a structure is the number of kernels of each layer that are among the best
of the network, by the method's own criterion. Scores are means over the positions of a kernel, so that layers
with kernels of different sizes compete, and over the batches of an epoch (Algorithm 2, line 6).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clicktrain.graph.prunable import ConvLayer
from clicktrain.methods.base import Record, StepInfo
from clicktrain.methods.triggers import StructureWatch
from clicktrain.sparsity.importance import CRITERIA, Criterion, kernel_scores, reads_gradient
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.stability import GRADIENT_THRESHOLD, MAGNITUDE_THRESHOLD, kept_kernels
from clicktrain.sparsity.triggers import StructureStable


def default_threshold(criterion: str | Criterion) -> float:
    """tau: that for magnitudes, or that for criteria that read gradients (section 4.2)."""
    if criterion == "magnitude":  # also what a file names that nobody imports can be shown with a threshold
        return MAGNITUDE_THRESHOLD
    known = criterion if not isinstance(criterion, str) else CRITERIA.get(criterion)
    return MAGNITUDE_THRESHOLD if known is not None and not reads_gradient(known) else GRADIENT_THRESHOLD


@dataclass(slots=True)
class KernelWatch:
    """What is remembered: scores of the running epoch, [F, C] per layer, and the structures before."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    watch: StructureWatch = field(default_factory=StructureWatch)

    def see(self, layers: Sequence[ConvLayer], criterion: str | Criterion, step: StepInfo) -> None:
        """Add up the scores of a batch; without gradients they are read once, at the end of an epoch."""
        score = CRITERIA.resolve(criterion)
        if not reads_gradient(score) and not step.ends_epoch:
            return
        for layer in layers:
            grad = step.gradient(layer.weight)
            if grad is None:
                continue
            kernels = kernel_scores(score(layer.weight.detach().float(), grad.float()))
            kernels /= layer.weight[0, 0].numel()
            before = self.sums.get(layer.name)
            self.sums[layer.name] = kernels if before is None else before.add_(kernels)

    def close_epoch(
        self,
        layers: Sequence[ConvLayer],
        share: float,
        window: int,
        threshold: float,
        criterion: str | Criterion,
    ) -> Record:
        """The structure of the epoch that has ended, and EPI.

        Args:
            layers: all that may be pruned.
            share: of their kernels that is kept.
            window: r of Eq. (6).
            threshold: tau.
            criterion: for the record.
        """
        scores = {
            layer.name: self.sums.get(layer.name, torch.zeros(layer.shape[:2], device=layer.weight.device))
            for layer in layers
        }
        self.sums = {}
        structure = dict(zip(scores, kept_kernels(scores, share), strict=True))
        return self.watch.add(structure, window, threshold, choice_name(criterion))

    def fires(self, threshold: float) -> str | None:
        """Why pruning may begin, or None."""
        return StructureStable(threshold).fires(self.watch.indicators)

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors and numbers."""
        return {"sums": dict(self.sums), **self.watch.state_dict()}

    @classmethod
    def from_state(cls, saved: Mapping[str, Any], to: Callable[[Tensor], Tensor]) -> KernelWatch:
        """Inverse of `state_dict`; ``to`` copies a tensor to its device."""
        sums = {name: to(value) for name, value in saved["sums"].items()}
        return cls(sums, StructureWatch.from_state(saved))
