"""Importance of neurons: criteria of neurons or of weights, summed over a neuron; means over batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

import torch
from torch import Tensor

from clicktrain.sparsity.channel_importance import batch_norm_taylor, filter_magnitude, filter_taylor
from clicktrain.sparsity.importance import CRITERIA, Criterion, reads_gradient
from clicktrain.sparsity.registry import Registry
from clicktrain.surgery.neurons import NeuronGroup, Rows

Gradient: TypeAlias = Callable[[Tensor], Tensor | None]
"""The gradient of a parameter, None if it had none in this batch."""


@dataclass(frozen=True, slots=True, eq=False)
class NeuronValues:
    """What a criterion of neurons may read: the parameters of a group and their gradients in one batch."""

    group: NeuronGroup
    parameters: Mapping[str, Tensor]
    gradient: Gradient

    def values(self, parts: Sequence[Rows]) -> list[Tensor]:
        """Per parameter [n, P]."""
        return [rows.take(self.parameters[rows.name]) for rows in parts]

    def gradients(self, parts: Sequence[Rows]) -> list[Tensor] | None:
        """Per parameter [n, P]; None if one had no gradient."""
        grads = [self.gradient(self.parameters[rows.name]) for rows in parts]
        if any(grad is None for grad in grads):
            return None
        return [rows.take(grad) for rows, grad in zip(parts, grads, strict=True) if grad is not None]


NeuronCriterion: TypeAlias = Callable[[NeuronValues], Tensor | None]
"""Scores of the neurons of a group after one batch, [n], larger = keep; None if a gradient is missing."""


def magnitude_of_neurons(of: NeuronValues) -> Tensor:
    """The norm over all filters of a neuron: When to Prune?, Eq. (2)."""
    return filter_magnitude(of.values(of.group.filters))


magnitude_of_neurons.reads_gradient = False  # type: ignore[attr-defined]


def taylor_of_weights(of: NeuronValues) -> Tensor | None:
    """The first-order change of the loss over all filters of a neuron: When to Prune?, Eq. (3)."""
    grads = of.gradients(of.group.filters)
    return None if grads is None else filter_taylor(of.values(of.group.filters), grads)


def taylor_of_neurons(of: NeuronValues) -> Tensor | None:
    """The first-order change of the loss by batch norm's scale and shift; without batch norm, Eq. (3)."""
    scales, shifts = of.group.scales, of.group.shifts
    if not scales:
        return taylor_of_weights(of)
    scale_grads, shift_grads = of.gradients(scales), of.gradients(shifts)
    if scale_grads is None or shift_grads is None:
        return None
    return batch_norm_taylor(of.values(scales), scale_grads, of.values(shifts), shift_grads)


def summed_over_weights(criterion: Criterion) -> NeuronCriterion:
    """A criterion of neurons: the scores of all weights of a neuron's filters, summed."""

    def scores(of: NeuronValues) -> Tensor | None:
        total: Tensor | None = None
        for rows in of.group.filters:
            weight = of.parameters[rows.name].detach().float()
            grad = of.gradient(of.parameters[rows.name]) if scores.reads_gradient else weight  # type: ignore[attr-defined]
            if grad is None:
                return None
            part = rows.take(criterion(weight, grad.float())).sum(dim=1)
            total = part if total is None else total + part
        return total

    scores.reads_gradient = reads_gradient(criterion)  # type: ignore[attr-defined]
    return scores


NEURON_CRITERIA: Registry[NeuronCriterion] = Registry(
    "criterion",
    {"taylor": taylor_of_neurons, "taylor_weights": taylor_of_weights, "magnitude": magnitude_of_neurons},
    beneath=CRITERIA,
    adapt=summed_over_weights,
)
"""Criteria of neurons, and all criteria of weights, summed."""
NeuronCriterionChoice: TypeAlias = Annotated[str | Criterion, NEURON_CRITERIA]


@dataclass(slots=True)
class ChannelScores:
    """Scores added up over batches, and how many batches these were, per group of neurons."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        groups: Sequence[NeuronGroup],
        criterion: NeuronCriterion,
        parameters: Mapping[str, Tensor],
        gradient: Gradient,
    ) -> None:
        """Add the scores of a batch; groups without a gradient are left out."""
        for group in groups:
            scores = criterion(NeuronValues(group, parameters, gradient))
            if scores is not None:
                before = self.sums.get(group.name)
                self.sums[group.name] = scores if before is None else scores.add_(before.to(scores))
                self.counts[group.name] = self.counts.get(group.name, 0) + 1

    def means(self, groups: Sequence[NeuronGroup], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Per group, the mean over batches, 0 without any gradient; magnitudes if no batch was seen."""
        if not self.sums:
            return {
                group.name: magnitude_of_neurons(NeuronValues(group, parameters, lambda _: None))
                for group in groups
            }
        return {
            group.name: self.sums[group.name] / self.counts[group.name]
            if group.name in self.sums
            else torch.zeros(group.size)
            for group in groups
        }
