"""What all integrations do alike: attach a method to the network of a framework, for a run of its length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from clicktrain.errors import UserError
from clicktrain.methods import Method, Pruner


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """What `Method.attach` is to be given, but for what only the framework knows.

    Attributes:
        method: what prunes.
        packed, accelerate, example, on_event: as of `Method.attach`; ``packed`` None packs on CPUs, where the
            fast kernels are.
    """

    method: Method[Any]
    packed: bool | None = None
    accelerate: bool | None = None
    example: Any = None
    on_event: Callable[[dict[str, Any]], None] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise UserError(
                f"method is a {type(self.method).__name__}: give one, as ClickTrain(compression=8)"
            )

    def without_acceleration(self) -> Attachment:
        """The same, with calls of the network left alone."""
        return replace(self, accelerate=False)

    def attach(
        self, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], epochs: int, steps: int
    ) -> Pruner:
        """Attach to a network; ``steps`` are calls of `Pruner.observe` in each of the epochs."""
        packed = self.packed
        if packed is None:
            packed = all(parameter.device.type == "cpu" for parameter in model.parameters())
        return self.method.attach(
            model,
            optimizers,
            epochs=epochs,
            steps_per_epoch=steps,
            packed=packed,
            accelerate=self.accelerate,
            example=self.example,
            on_event=self.on_event,
        )


def epochs_and_steps(total: float, per_epoch: float) -> tuple[int, int]:
    """Whole epochs and the steps of each, for a run of ``total`` steps with ``per_epoch`` in an epoch.

    Where a run ends inside an epoch, all are taken as a bit longer; where it ends inside the first, as short
    as it is.

    Raises:
        UserError: the run has no end that is known.
    """
    if not math.isfinite(total) or total < 1:
        raise UserError(
            "the length of the run is not known, and pruning is planned by it: give the trainer a number of "
            "epochs and data with a length, or a number of steps"
        )
    epochs = max(int(total // per_epoch), 1) if math.isfinite(per_epoch) and per_epoch >= 1 else 1
    return epochs, math.ceil(total / epochs)


def only_network(parent: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the only child with parameters; "" and the parent itself where there are several."""
    children = [
        (name, child) for name, child in parent.named_children() if next(child.parameters(), None) is not None
    ]
    if len(children) == 1 and not any(True for _ in parent.parameters(recurse=False)):
        return children[0]
    return "", parent
