"""Hugging Face Accelerate: a loop of one's own under an ``Accelerator``, pruned while it trains.

pruning = Pruning(accelerator, ClickTrain(compression=8), model, optimizer, epochs=20, steps_per_epoch=n)
for x, y in loader:                                  # loader and scheduler: accelerator.prepare
    with pruning.accumulate():
        loss = F.cross_entropy(pruning(x), y)        # instead of model(x)
        pruning.backward(loss)                       # instead of accelerator.backward(loss)
        pruning.optimizer.step()
        pruning.optimizer.zero_grad()
model = pruning.finish()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from clicktrain.errors import UserError
from clicktrain.integrations.attaching import Attachment
from clicktrain.methods import Method, Pruner


class Pruning:
    """A network and its optimizer under an Accelerator, with a method attached.

    With several processes, the network is wrapped by DistributedDataParallel, again whenever its weights are
    replaced, which ``accelerator.prepare(model)`` would not do. ``accelerator.save_state`` and ``load_state``
    include network, optimizer and pruner; call ``load_state`` after this object is made.

    Args:
        accelerator: of the loop.
        method: what prunes.
        model: the network itself; it is moved to the accelerator's device.
        optimizer: over its parameters, as it was made.
        epochs, steps_per_epoch: length of the run, in calls of `backward`.
        packed, accelerate, example, on_event: as of `Method.attach`; packed on CPUs by default.

    Attributes:
        pruner: the method at work.
        model: the network, always the same object.
        optimizer: prepared by the accelerator.

    Raises:
        UserError: as `Method.attach`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        method: Method[Any],
        model: nn.Module,
        optimizer: Optimizer,
        *,
        epochs: int,
        steps_per_epoch: int,
        packed: bool | None = None,
        accelerate: bool | None = None,
        example: Any = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
            raise UserError("give the optimizer as it was made: accelerator.prepare is called on it here")
        attachment = Attachment(
            method=method, packed=packed, accelerate=accelerate, example=example, on_event=on_event
        )
        self.accelerator, self.model = accelerator, model.to(accelerator.device)
        self.pruner: Pruner = attachment.attach(self.model, optimizer, epochs, steps_per_epoch)
        several = accelerator.num_processes > 1
        self._wrapped = self.pruner.wrapped(DistributedDataParallel) if several else None
        self._plain_optimizer = optimizer
        self.optimizer: Any = accelerator.prepare(optimizer)
        accelerator.register_for_checkpointing(self)

    @property
    def forward(self) -> nn.Module:
        """What is called for a pass: the network, or the wrapper around it as it is now."""
        return self.model if self._wrapped is None else self._wrapped.current

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network in the accelerator's precision; outputs are float32, as Accelerate's are."""
        with self.accelerator.autocast():
            return convert_to_fp32(self.forward(*args, **kwargs))

    def accumulate(self) -> Any:
        """``accelerator.accumulate``: a context in which gradients of several batches are added up."""
        return self.accelerator.accumulate(self.forward)

    def backward(self, loss: Tensor) -> None:
        """``accelerator.backward(loss)``, after which the method sees the loss: the mean of one batch."""
        self.accelerator.backward(loss)
        self.pruner.observe(loss)
        self.pruner.mask_gradients()

    def finish(self, packed: bool = False) -> nn.Module:
        """End the run, in every process; see `Pruner.finish`."""
        return self.pruner.finish(packed)

    def state_dict(self) -> dict[str, Any]:
        """Pruner, network and optimizer, for ``accelerator.save_state``."""
        return {
            "pruner": self.pruner.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self._plain_optimizer.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a saved state; Accelerate calls it after it has loaded the optimizer alone."""
        self._plain_optimizer.state.clear()  # of the weights that it had when it was saved
        self.pruner.load_state_dict(saved["pruner"])
        self.model.load_state_dict(saved["model"])
        self._plain_optimizer.load_state_dict(saved["optimizer"])
