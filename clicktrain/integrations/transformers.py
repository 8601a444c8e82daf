"""Hugging Face Transformers: a callback that prunes the network of a ``Trainer`` while it trains.

trainer = Trainer(model, args, train_dataset=data, callbacks=[PruningCallback(ClickTrain(compression=8))])
trainer.train()
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from clicktrain.errors import UserError
from clicktrain.formats.tree import load_tree, save_tree
from clicktrain.integrations.attaching import Attachment, epochs_and_steps
from clicktrain.kernels.pack_model import unpack
from clicktrain.methods import Method, Pruner
from clicktrain.methods.driver.publisher import ChannelsRemoved, MasksFrozen

STATE = "pruning.safetensors"
"""In a folder ``checkpoint-N``: what a run needs to go on."""


class PruningCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches a method when training begins, observes losses, and ends with a plain pruned network.

    The loss is the one that the network returns in training (it is given labels); one observation is made
    for each step of the optimizer, the mean over its batches (a share of it where a network divides by
    the images of the whole step: only ClickTrain's first stage looks at the size of a loss). Saved
    checkpoints hold the plain weights, which ``from_pretrained`` loads, and the state of the pruner:
    ``train(resume_from_checkpoint=...)`` goes on with masks, unless channels were removed before. The
    best model by a metric is looked for from the freezing of masks, or the removal of channels, on: an
    unpruned network would win.

    Args:
        method: what prunes, as ``ClickTrain(compression=8)``.
        packed, accelerate, example, on_event: as of `Method.attach`; packed on CPUs by default. Methods that
            remove channels need ``example={"pixel_values": images}``.

    Attributes:
        pruner: from the beginning of training on.
    """

    def __init__(
        self,
        method: Method[Any],
        *,
        packed: bool | None = None,
        accelerate: bool | None = None,
        example: Any = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._attachment = Attachment(
            method=method, packed=packed, accelerate=accelerate, example=example, on_event=on_event
        )
        self._losses: list[Tensor] = []
        self._hook: RemovableHandle | None = None
        self.pruner: Pruner | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Attach the method, and go on where a checkpoint was."""
        model, optimizer = given["model"], _plain(given["optimizer"])
        if args.world_size > 1 or args.n_gpu > 1:
            raise UserError(
                "the Trainer wraps its network once for several devices, but pruning replaces weights: use "
                "one, or a loop of your own (clicktrain.integrations.accelerate)"
            )
        updates = max(-(-len(given["train_dataloader"]) // args.gradient_accumulation_steps), 1)
        if self._attachment.method.reads_graph and self._attachment.example is None:
            raise UserError(
                f"method {self._attachment.method.name} follows channels through the network: give example, "
                'as {"pixel_values": torch.zeros(2, 3, 224, 224)}'
            )
        epochs, steps = epochs_and_steps(state.max_steps, updates)
        if state.global_step:
            optimizer.state.clear()  # of the packed weights that were saved; `_go_on` loads it again
        pruner = self.pruner = self._attachment.attach(model, optimizer, epochs, steps)
        if state.global_step:
            _go_on(pruner, optimizer, Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._losses = []
        self._hook = model.register_forward_hook(self._note_loss, with_kwargs=True)

        def forget_best(_: object) -> None:
            state.best_metric = state.best_model_checkpoint = None

        pruner.subscribe(forget_best, (MasksFrozen, ChannelsRemoved))

    def _note_loss(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
        if model.training and isinstance(loss, Tensor) and loss.requires_grad:
            self._losses.append(loss.detach())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Have the method see the losses since the last step."""
        assert self.pruner is not None
        if not self._losses:
            raise UserError(
                "the network returned no loss in training: give it labels (compute_loss_func and label "
                "smoothing compute a loss outside of the network, where a callback does not see it)"
            )
        losses = torch.stack([loss.float().reshape(()) for loss in self._losses])
        self.pruner.observe(losses.mean())
        self._losses = []

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Write plain weights over packed ones, and the state of the pruner beside them."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.pruner is not None and folder.is_dir():
            weights = dict(given["model"].state_dict())
            save_tree(folder / STATE, {"pruner": self.pruner.state_dict(), "model": weights})
            if self.pruner.packed:
                plain: Any = unpack(given["model"])
                plain.save_pretrained(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Hand the plain pruned network back."""
        assert self.pruner is not None
        if self._hook is not None:
            self._hook.remove()
        self.pruner.finish()


def _plain(optimizer: Any) -> Optimizer:
    """What Accelerate has wrapped."""
    inner = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(inner, Optimizer)
    return inner


def _go_on(pruner: Pruner, optimizer: Optimizer, folder: Path) -> None:
    """The Trainer has loaded plain weights, of which `attach` may have kept those of its first masks only."""
    if not (folder / STATE).exists():
        raise UserError(
            f"{folder} holds no state of a pruner ({STATE}): its run was not pruned by this callback"
        )
    saved = load_tree(folder / STATE)
    pruner.load_state_dict(saved["pruner"])
    pruner.model.load_state_dict(saved["model"])
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
