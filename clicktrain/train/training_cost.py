"""What training costs, in FLOPs of one image."""

from __future__ import annotations

from torch import Tensor, nn

from clicktrain.accounting import ModelCost, count
from clicktrain.accounting.cost import moved
from clicktrain.methods import Pruner
from clicktrain.methods.driver.publisher import (
    ChannelsRemoved,
    MasksFrozen,
    MasksMoved,
    Notification,
    ParametersReplaced,
)


class TrainingCost:
    """FLOPs of training on one image: as executed (`now`), and as papers count them (`nominal`).

    Executed is dense until masks are frozen, sparse from then on; sparse too where layers are packed while
    masks move, and then the gradients of all weights on top in the steps that compute them.

    Attributes:
        initial: cost of the network before anything is removed from it.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        """Count the model on ``example`` [1, C, H, W], on its device."""
        self._model, self._example = model, example
        self._pruner: Pruner | None = None
        self.initial = count(model, example)
        self._current: ModelCost | None = self.initial
        self._masked: tuple[ModelCost, dict[str, int], ModelCost] | None = None

    def follow(self, pruner: Pruner) -> None:
        """Count again whenever the pruner has removed channels, packed layers, or moved or frozen masks."""
        self._pruner = pruner
        if pruner.moving:
            self._current = None
        pruner.subscribe(self._outdate, (ChannelsRemoved, MasksFrozen))
        pruner.subscribe(self._follow_packing, ParametersReplaced)
        pruner.subscribe(self._follow_move, MasksMoved)

    def _outdate(self, change: Notification) -> None:
        self._current = None

    def _follow_packing(self, change: Notification) -> None:
        if self._current is self.initial and self._pruner is not None and self._pruner.moving:
            self._current = None

    def _follow_move(self, change: Notification) -> None:
        """The network does what it did, with other numbers of weights."""
        if self._pruner is not None and self._current not in (None, self.initial):
            layers = self._pruner.network.moving
            self._current = moved(self._current, {name: one.structure.nnz for name, one in layers.items()})

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
        """Training FLOPs of one image in the step that begins."""
        extra = 0
        if self._pruner is not None and self._pruner.collecting:
            moving = self._pruner.network.moving
            extra = sum(one.grad_weight_flops_dense for one in self.current.layers if one.name in moving)
        return self.usual + extra

    def nominal(self, batches: int) -> int:
        """Training FLOPs of one image as sparse training counts them, whatever operators run.

        A weight that is masked costs nothing in any pass while masks move either, but for the gradients of
        all weights in a step that reads them: ``3 f_S`` in a usual step and ``2 f_S + f_D`` in such a one
        (Evci et al. 2020, appendix H; f_S and f_D are the sparse and the dense forward pass). Methods that
        mask nothing before masks are frozen have the FLOPs that are executed.

        Args:
            batches: after how many more batches, the one that begins included, the optimizer steps.
        """
        pruner = self._pruner
        kept = {} if pruner is None or pruner.frozen else pruner.network.kept
        if pruner is None or not kept:
            return self.now
        current = self.current
        if self._masked is None or self._masked[0] is not current or self._masked[1] != kept:
            self._masked = current, kept, moved(current, kept)
        masked = self._masked[2]
        flops = masked.training_flops
        if pruner.reads_all_gradients(batches):
            flops += sum(
                one.grad_weight_flops_dense - one.grad_weight_flops
                for one in masked.layers
                if one.name in kept
            )
        return flops

    @property
    def usual(self) -> int:
        """Training FLOPs of one image in steps that do not compute the gradients of all weights."""
        return self.dense if self._current is self.initial else self.current.training_flops

    @property
    def forward_now(self) -> int:
        """FLOPs of a forward pass of one image."""
        dense = self._current is self.initial
        return self.initial.forward_flops_dense if dense else self.current.forward_flops
