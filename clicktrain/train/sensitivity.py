"""How much accuracy each layer alone costs, pruned to several sparsities without training on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.data import Batch, Loader
from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayer, find_prunable
from clicktrain.sparsity.importance import magnitude_importance
from clicktrain.sparsity.units import Unit
from clicktrain.train.config import Precision
from clicktrain.train.evaluate import evaluate
from clicktrain.train.views import Views

SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
UNITS = {"weight": Unit(), "kernel": Unit((2, 3))}
"""What is pruned as one, by name; in a linear layer a kernel is a weight."""


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer.

    Attributes:
        shape: of its weight.
        sparsity: share of its weights that is zero already.
        accuracies: percent, with only this layer pruned, for each sparsity asked for; that of the network as
            it is where the layer is as sparse already.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float
    accuracies: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """All layers of a network, in its order.

    Attributes:
        granularity: what was pruned as one, of `UNITS`.
        images: how many accuracies are over.
        accuracy: of the network as it is, percent.
        sparsities: of a layer, rising.
    """

    granularity: str
    images: int
    accuracy: float
    sparsities: tuple[float, ...]
    layers: tuple[LayerSensitivity, ...]

    @property
    def noise(self) -> float:
        """Standard error of an accuracy over so few images, in points."""
        share = min(max(self.accuracy / 100, 0.5 / self.images), 1 - 0.5 / self.images)
        return 100 * math.sqrt(share * (1 - share) / self.images)

    def to_json(self) -> dict[str, Any]:
        """As plain values, with the points of accuracy that each pruning costs."""
        layers = [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "weights": math.prod(layer.shape),
                "sparsity": layer.sparsity,
                "accuracies": list(layer.accuracies),
                "lost": [self.accuracy - accuracy for accuracy in layer.accuracies],
            }
            for layer in self.layers
        ]
        return {
            "granularity": self.granularity,
            "images": self.images,
            "accuracy": self.accuracy,
            "standard_error": self.noise,
            "sparsities": list(self.sparsities),
            "layers": layers,
        }


class SomeImages(Loader):
    """Batches of a loader, held in memory: every image, or as many as asked for, evenly spread over them."""

    def __init__(self, loader: Loader, images: int, most: int | None) -> None:
        """``images``: how many ``loader`` has; ``most``: how many to take of them, None for all."""
        taken = images if most is None else min(most, images)
        chosen = {number * images // taken for number in range(taken)}
        self._batches: list[Batch] = []
        seen = 0
        for x, y in loader.epoch(0):
            here = [at for at in range(len(y)) if seen + at in chosen]
            seen += len(y)
            if here:
                self._batches.append(Batch(x[here].clone(), y[here].clone()))

    def __len__(self) -> int:
        return len(self._batches)

    def with_batch_size(self, batch_size: int) -> Loader:
        """Not needed here."""
        raise NotImplementedError

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """The same batches each time."""
        del epoch
        return iter(self._batches[start_batch:])


def layer_sensitivity(
    model: nn.Module,
    loader: Loader,
    *,
    device: torch.device,
    sparsities: Sequence[float] = SPARSITIES,
    granularity: str = "weight",
    precision: Precision = "fp32",
    views: Views = "none",
    message: Callable[[str], None] = lambda text: None,
) -> Sensitivity:
    """Prune one layer after the other by magnitude, and measure the accuracy of the whole network each time.

    Weights are pruned from the smallest up, until the share asked for is zero; those that are zero already
    count. Each layer has its weights back, bit for bit, before the next one is pruned. This is a first order
    view: layers that are pruned together, and trained on, behave differently.

    Args:
        model: the network, on ``device``, with plain weights (zeros where it is pruned).
        loader: the images that count.
        device, precision, views: as `evaluate`.
        sparsities: shares of a layer's weights, in any order.
        granularity: ``weight``, or ``kernel`` for whole kernels of convolutions.
        message: called with a sentence before each layer.

    Raises:
        UserError: a sparsity is out of range, or the network has no layer that can be pruned.
    """
    wanted = tuple(sorted(set(sparsities)))
    if not wanted or not all(0 < share < 1 for share in wanted):
        raise UserError(f"sparsities are {list(sparsities)}: shares between 0 and 1 are needed, as 0.5 0.9")
    layers = find_prunable(model, include=("*",), linear=True).layers
    if not layers:
        raise UserError("this network has no convolution or linear layer that can be pruned")

    def accuracy() -> tuple[float, int]:
        result = evaluate(model, loader, device=device, precision=precision, views=views)
        assert result is not None  # only a stop that is asked for gives none
        return result.accuracy, result.images

    whole, images = accuracy()
    rows = []
    for number, layer in enumerate(layers, 1):
        message(f"layer {number} of {len(layers)}: {layer.name}")
        weight = layer.weight
        before, density = weight.detach().clone(), float(weight.detach().count_nonzero()) / weight.numel()
        reached = []
        try:
            for share in wanted:
                mask = magnitude_mask(layer, before, share, UNITS[granularity])
                same = bool((mask | (before == 0)).all())
                with torch.no_grad():
                    weight.copy_(before * mask)
                reached.append(whole if same else accuracy()[0])
        finally:
            with torch.no_grad():
                weight.copy_(before)
        rows.append(LayerSensitivity(layer.name, layer.shape, 1 - density, tuple(reached)))
    return Sensitivity(granularity, images, whole, wanted, tuple(rows))


def magnitude_mask(layer: PrunableLayer, weight: Tensor, sparsity: float, unit: Unit) -> Tensor:
    """Which weights of a layer stay if this share of its units goes, the smallest first: bool, its shape.

    The share is rounded to whole units; of equal ones those that come first in the weight go first.
    """
    view = layer.view(weight).float()
    scores = unit.scores(magnitude_importance(view, view))
    gone = round(sparsity * scores.numel())
    units = torch.ones(scores.numel(), dtype=torch.bool, device=weight.device)
    units[scores.flatten().argsort(stable=True)[:gone]] = False
    return layer.unview(unit.weights(units.reshape(scores.shape), layer.view_shape))
