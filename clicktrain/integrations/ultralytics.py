"""Ultralytics: YOLO networks that are pruned while they train.

yolo = YOLO("yolo11n.yaml")
yolo.train(data="data.yaml", epochs=100, trainer=pruned_trainer(yolo, RigL(sparsity=0.8)))
yolo.export(format="onnx")                           # the pruned network
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from ultralytics import YOLO
from ultralytics.engine.trainer import BaseTrainer

from clicktrain.errors import UserError
from clicktrain.integrations.attaching import Attachment
from clicktrain.methods import Method, Pruner
from clicktrain.methods.driver.publisher import ChannelsRemoved, MasksFrozen


def pruned_trainer(
    yolo: YOLO,
    method: Method[Any],
    *,
    base: type[BaseTrainer] | None = None,
    packed: bool = False,
    accelerate: bool | None = None,
    example: Any = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> type[BaseTrainer]:
    """The trainer of a YOLO's task with a method attached, for ``yolo.train(trainer=...)``.

    The moving average that Ultralytics evaluates and saves is pruned with the network. ``best.pt`` and
    ``last.pt`` hold plain networks with zeros, or with fewer channels; the best is looked for from the
    freezing of masks, or the removal of channels, on: an unpruned network would win.

    Args:
        yolo: what will be trained; only its task is looked at.
        method: what prunes.
        base: a trainer class of your own.
        packed, accelerate, example, on_event: as of `Method.attach`. The example is a batch of images of the
            run's size by default.

    Returns:
        A class whose objects have ``pruner``, from the start of training on: ``yolo.trainer.pruner``.

    Raises:
        UserError: ``method`` is none; at the start of training, as `Method.attach`, or that the run is
            resumed or has several devices.
    """
    attachment = Attachment(
        method=method, packed=packed, accelerate=accelerate, example=example, on_event=on_event
    )
    parent: Any = base or yolo.task_map[yolo.task]["trainer"]
    name = f"Pruned{parent.__name__}"
    return type(name, (_Pruned, parent), {"attachment": attachment, "__doc__": _Pruned.__doc__})


class _Pruned:
    """A trainer that prunes; see `pruned_trainer`. It comes before one of Ultralytics among the parents."""

    attachment: Attachment
    pruner: Pruner | None = None
    _observed = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        itself: Any = self
        several = itself.world_size > 1
        if several or itself.args.resume:
            what = "on several devices" if several else "with resume=True"
            raise UserError(f"Ultralytics cannot prune {what}: its run would go on without the pruner")
        itself.add_callback("on_train_start", _Pruned._attach)
        itself.add_callback("on_train_batch_end", _Pruned._after_batch)

    def train(self) -> Any:
        """Train; whatever happens, network and optimizer are free again afterwards."""
        parent: Any = super()
        try:
            return parent.train()
        finally:
            if self.pruner is not None:
                self.pruner.close()

    def _attach(self: Any) -> None:
        example = self.attachment.example
        if example is None:
            side = self.args.imgsz
            example = torch.zeros(2, self.data.get("channels", 3), side, side, device=self.device)
        attachment = Attachment(**{**vars(self.attachment), "example": example})
        self.pruner = attachment.attach(self.model, self.optimizer, self.epochs, len(self.train_loader))
        self.pruner.follow(self.ema.ema)
        self.pruner.subscribe(lambda _: self._forget_best(), (MasksFrozen, ChannelsRemoved))

    def _forget_best(self: Any) -> None:
        self.best_fitness = None
        self.stopper.best_fitness, self.stopper.best_epoch = 0.0, self.epoch

    def _observe(self: Any) -> None:
        """The loss of one image: Ultralytics sums it over the batch."""
        if not self._observed:
            items = self.loss_items
            parts = list(items.values()) if isinstance(items, dict) else [items]
            self.pruner.observe(
                sum((torch.as_tensor(part).detach().sum() for part in parts), torch.zeros(()))
            )
            self._observed = True

    def _after_batch(self: Any) -> None:
        self._observe()
        self._observed = False

    def optimizer_step(self) -> None:
        """Have the method see loss and gradients, before gradients are clipped."""
        parent: Any = super()
        assert self.pruner is not None
        self._observe()
        self.pruner.mask_gradients()
        parent.optimizer_step()

    def validate(self: Any) -> Any:
        """End the run before its last validation, so that what is measured and saved is the result."""
        if self.epoch + 1 >= self.epochs:
            self._finish()
        return super().validate()  # type: ignore[misc]

    def save_model(self: Any) -> Any:
        """End the run before the last checkpoint of one that stops early."""
        if self.stop:
            self._finish()
        return super().save_model()  # type: ignore[misc]

    def _finish(self: Any) -> None:
        if self.pruner.ended:
            return
        self.pruner.finish()
