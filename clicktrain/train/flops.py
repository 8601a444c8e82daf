"""What a run costs, by its true course."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from clicktrain.accounting import count


class TrainingCost:
    """FLOPs of training on one image: dense until positions are fixed, sparse from then on."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        """Count the model on ``example`` [1, C, H, W], on its device."""
        self._model = model
        self._example = example
        self.initial = self.cost = count(model, example)
        self.dense = self.cost.training_flops_dense
        self.now = self.dense

    def shrink(self) -> None:
        """The model has become smaller; it is dense."""
        self.cost = count(self._model, self._example, {})
        self.now = self.cost.training_flops

    def freeze(self, masks: Mapping[str, Tensor]) -> None:
        """From now on a weight outside ``masks`` costs nothing, in none of the three passes."""
        self.cost = count(self._model, self._example, masks)
        self.now = self.cost.training_flops
