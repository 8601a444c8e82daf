"""What a run costs: FLOPs as they are executed."""

from __future__ import annotations

from torch import Tensor, nn

from clicktrain.accounting import ModelCost, count
from clicktrain.methods import Pruner
from clicktrain.methods.driver.publisher import ChannelsRemoved, MasksFrozen, Notification


class TrainingCost:
    """FLOPs of training on one image: dense until masks are frozen, sparse from then on.

    Attributes:
        initial: cost of the network before anything is removed from it.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        """Count the model on ``example`` [1, C, H, W], on its device."""
        self._model = model
        self._example = example
        self._pruner: Pruner | None = None
        self.initial = count(model, example)
        self._current: ModelCost | None = self.initial

    def follow(self, pruner: Pruner) -> None:
        """Count again whenever the pruner has removed channels or frozen masks."""
        self._pruner = pruner
        pruner.subscribe(self._outdate, (ChannelsRemoved, MasksFrozen))

    def _outdate(self, change: Notification) -> None:
        self._current = None

    @property
    def current(self) -> ModelCost:
        """Cost of the network as it is; a weight outside frozen masks costs nothing in any of the passes."""
        if self._current is None:
            assert self._pruner is not None
            masks = self._pruner.masks if self._pruner.frozen else {}
            self._current = count(self._model, self._example, masks)
        return self._current

    @property
    def dense(self) -> int:
        """Training FLOPs of one image in the network as it was at first."""
        return self.initial.training_flops_dense

    @property
    def now(self) -> int:
        """Training FLOPs of one image."""
        return self.dense if self._current is self.initial else self.current.training_flops
