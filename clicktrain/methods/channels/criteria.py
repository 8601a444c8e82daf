"""Importance of neurons: channel criteria, weight criteria summed over a neuron, means over batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from clicktrain.sparsity.channel_importance import batch_norm_taylor, filter_magnitude, filter_taylor
from clicktrain.sparsity.importance import Criterion
from clicktrain.surgery.neurons import NeuronGroup, Rows

Gradient: TypeAlias = Callable[[Tensor], Tensor | None]
"""The gradient of a parameter, None if it had none in this batch."""
NormScore: TypeAlias = Callable[
    [Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], Tensor
]


@dataclass(frozen=True, slots=True)
class ChannelCriterion:
    """A score for each of n neurons, larger = keep.

    Attributes:
        score: (weights, gradients) -> [n]; one [n, k] for each layer that the neurons belong to.
        of_norms: used instead where batch norms follow: (scales, their gradients, shifts, their gradients).
        reads_gradient: whether there is no score without a gradient.
    """

    score: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
    of_norms: NormScore | None = None
    reads_gradient: bool = True

    def of(self, group: NeuronGroup, parameters: Mapping[str, Tensor], gradient: Gradient) -> Tensor | None:
        """Scores of the neurons of a group after one batch, [n]; None if a gradient is missing."""

        def values(parts: Sequence[Rows]) -> list[Tensor]:
            return [rows.take(parameters[rows.name]) for rows in parts]

        def gradients(parts: Sequence[Rows]) -> list[Tensor] | None:
            grads = [(rows, gradient(parameters[rows.name])) for rows in parts]
            taken = [rows.take(grad) for rows, grad in grads if grad is not None]
            return taken if len(taken) == len(grads) else None

        if not self.reads_gradient:
            return self.score(values(group.filters), [])
        if self.of_norms is None or not group.scales:
            grads = gradients(group.filters)
            return None if grads is None else self.score(values(group.filters), grads)
        scales, shifts = gradients(group.scales), gradients(group.shifts)
        if scales is None or shifts is None:
            return None
        return self.of_norms(values(group.scales), scales, values(group.shifts), shifts)


def summed(criterion: Criterion) -> ChannelCriterion:
    """The scores that a weight criterion gives, summed over a neuron."""

    def score(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
        return torch.stack([criterion(w, g).sum(1) for w, g in zip(weights, grads, strict=True)]).sum(0)

    return ChannelCriterion(score)


MAGNITUDE = ChannelCriterion(lambda weights, _: filter_magnitude(weights), reads_gradient=False)
CHANNEL_CRITERIA: dict[str, ChannelCriterion] = {
    "taylor": ChannelCriterion(filter_taylor, batch_norm_taylor),
    "taylor_weights": ChannelCriterion(filter_taylor),
    "magnitude": MAGNITUDE,
}


@dataclass(slots=True)
class ChannelScores:
    """Scores added up over batches, and how many batches these were, per group of neurons."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        groups: Sequence[NeuronGroup],
        criterion: ChannelCriterion,
        parameters: Mapping[str, Tensor],
        gradient: Gradient,
    ) -> None:
        """Add the scores of a batch; groups without a gradient are left out."""
        for group in groups:
            scores = criterion.of(group, parameters, gradient)
            if scores is not None:
                before = self.sums.get(group.name)
                self.sums[group.name] = scores if before is None else scores.add_(before.to(scores))
                self.counts[group.name] = self.counts.get(group.name, 0) + 1

    def means(self, groups: Sequence[NeuronGroup], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Per group, the mean over batches, 0 without any gradient; magnitudes if no batch was seen."""
        if not self.sums:
            scores = {group.name: MAGNITUDE.of(group, parameters, lambda _: None) for group in groups}
            return {name: score for name, score in scores.items() if score is not None}
        return {
            group.name: self.sums[group.name] / self.counts[group.name]
            if group.name in self.sums
            else torch.zeros(group.size)
            for group in groups
        }
