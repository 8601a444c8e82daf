"""Lightning: a callback that prunes while its Trainer trains, in automatic and in manual optimization.

    trainer = Trainer(max_epochs=20, callbacks=[PruningCallback(ClickTrain(compression=8))])
    trainer.fit(module, loader)

``lightning.pytorch`` and ``pytorch_lightning`` are both served.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clicktrain.errors import UserError
from clicktrain.integrations.attaching import Attachment, epochs_and_steps, only_network
from clicktrain.integrations.lightning_package import Callback
from clicktrain.kernels.pack_model import dense_state_dict
from clicktrain.methods import Method, Pruner
from clicktrain.methods.driver.publisher import ChannelsRemoved, MasksFrozen, Wrapped
from clicktrain.surgery import SurgeryPlan, apply_surgery_

_KEY = "clicktrain"


class PruningCallback(Callback):  # type: ignore[misc]
    """Attaches a method when training starts, observes losses, and ends with a plain pruned network.

    Checkpoints hold the plain weights under ``state_dict``, so that ``load_from_checkpoint`` works unless
    channels were removed (`load_checkpoint_` does then), and what a run needs to go on
    (``trainer.fit(ckpt_path=...)``). When masks are frozen or channels removed, checkpoints that are the best
    by a metric begin again: an unpruned network would win.

    Args:
        method: what prunes, as ``ClickTrain(compression=8)``.
        network: the module that is pruned, or its name in the LightningModule; by default the only child with
            parameters, or the LightningModule itself where there are several.
        packed, accelerate, example, on_event: as of `Method.attach`; packed on CPUs by default.

    Attributes:
        pruner: from the start of training on.
    """

    def __init__(
        self,
        method: Method[Any],
        *,
        network: str | nn.Module | None = None,
        packed: bool | None = None,
        accelerate: bool | None = None,
        example: Any = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        super().__init__()
        self._attachment = Attachment(
            method=method, packed=packed, accelerate=accelerate, example=example, on_event=on_event
        )
        self._network = network
        self._loaded: dict[str, Any] | None = None
        self._loss: Tensor | None = None
        self._wrapped: Wrapped[Any] | None = None
        self._prefix = ""
        self.pruner: Pruner | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Be asked before weights are loaded and after they are saved; no hook of a callback is."""
        if stage == "fit":
            load, save = pl_module.on_load_checkpoint, pl_module.on_save_checkpoint

            def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
                load(checkpoint)
                self._take_over(checkpoint, pl_module)

            def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
                self._put_in(checkpoint)
                save(checkpoint)

            pl_module.on_load_checkpoint, pl_module.on_save_checkpoint = (
                on_load_checkpoint,
                on_save_checkpoint,
            )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave nothing of this callback in the LightningModule, however the run ended."""
        for name in ("on_load_checkpoint", "on_save_checkpoint"):
            vars(pl_module).pop(name, None)
        if self.pruner is not None:
            self.pruner.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Free network and optimizers for another try."""
        self.teardown(trainer, pl_module, "fit")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach the method, and go on where a checkpoint was."""
        self._prefix, network = self._find_network(pl_module)
        several, attachment = trainer.world_size > 1, self._attachment
        if several and network is pl_module:
            attachment = (
                attachment.without_acceleration()
            )  # its calls are the strategy's way to training_step
        self.pruner = attachment.attach(network, list(trainer.optimizers), *_length(trainer))
        if several:
            self._wrapped = self.pruner.wrapped(
                lambda network: _wrapped_again(trainer, network, self._prefix)
            )
        if self._loaded is not None:
            self.pruner.load_state_dict(self._loaded["pruner"])
            pl_module.load_state_dict(self._loaded["model"])
            for optimizer, state in zip(trainer.optimizers, self._loaded["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self._loaded = None
        self.pruner.subscribe(lambda _: _forget_best(trainer), (MasksFrozen, ChannelsRemoved))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """With several processes, wrap the network again if its parameters were replaced."""
        if self._wrapped is not None:
            _ = self._wrapped.current

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Keep the loss: of one batch, as it was before Lightning scaled it."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = trainer.accumulate_grad_batches / (1.0 if scaler is None else scaler.get_scale())
        self._loss = loss.detach() * scale

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Have the method see loss and gradients, before gradients are clipped."""
        if self.pruner is not None and self._loss is not None:
            self.pruner.observe(self._loss)
            self.pruner.mask_gradients()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Hand the plain pruned network back."""
        assert self.pruner is not None
        self.pruner.finish()
        if self._wrapped is not None:
            _ = self._wrapped.current

    def _find_network(self, pl_module: nn.Module) -> tuple[str, nn.Module]:
        if self._network is None:
            return only_network(pl_module)
        if isinstance(self._network, str):
            return self._network, pl_module.get_submodule(self._network)
        names = [name for name, module in pl_module.named_modules() if module is self._network]
        if not names:
            raise UserError("network is no part of the LightningModule: give its name, or the module in it")
        return names[0], self._network

    def _put_in(self, checkpoint: dict[str, Any]) -> None:
        pruner = self.pruner
        if pruner is None:
            return
        packed, prefix = checkpoint["state_dict"], f"{self._prefix}." if self._prefix else ""
        plain = {f"{prefix}{name}": value for name, value in dense_state_dict(pruner.model).items()}
        others = {name: value for name, value in packed.items() if not name.startswith(prefix)}
        checkpoint["state_dict"] = {**others, **plain}
        saved = {"prefix": self._prefix, "plans": pruner.state_dict()["plans"]}
        if "optimizer_states" in checkpoint:
            saved |= {"pruner": pruner.state_dict(), "model": packed}
        checkpoint[_KEY] = saved

    def _take_over(self, checkpoint: dict[str, Any], pl_module: nn.Module) -> None:
        """Keep what is loaded for later: no network is packed, and no channel removed, before attach."""
        saved = checkpoint.get(_KEY)
        if saved is None or "pruner" not in saved:
            raise UserError(
                "this checkpoint holds no pruning to go on with: it was saved without this callback"
            )
        self._loaded = {**saved, "optimizers": checkpoint["optimizer_states"]}
        checkpoint["state_dict"], checkpoint["optimizer_states"] = pl_module.state_dict(), []


def load_checkpoint_(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Load a checkpoint into a fresh LightningModule, also one that has lost channels.

    Args:
        module: gets smaller where the network was.
        checkpoint: what ``torch.load`` gives for the file.
    """
    saved = checkpoint.get(_KEY, {})
    network = module.get_submodule(saved.get("prefix", ""))
    for document in saved.get("plans", ()):
        apply_surgery_(SurgeryPlan.from_json(json.loads(document)), network)
    module.load_state_dict(checkpoint["state_dict"])


def _length(trainer: Any) -> tuple[int, int]:
    per_epoch = float(trainer.num_training_batches)
    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    steps = math.inf if trainer.max_steps == -1 else trainer.max_steps * trainer.accumulate_grad_batches
    return epochs_and_steps(min(epochs * per_epoch, steps), per_epoch)


def _wrapped_again(trainer: Any, network: nn.Module, prefix: str) -> Any:
    """Have the strategy wrap the LightningModule as it is now."""
    strategy = trainer.strategy
    if not isinstance(strategy.model, DistributedDataParallel):
        raise UserError(
            f"{type(strategy).__name__} cannot train a network whose weights are replaced: use strategy='ddp'"
        )
    module = strategy.lightning_module
    ignored = getattr(network, "_ddp_params_and_buffers_to_ignore", ())
    names = [f"{prefix}.{name}" if prefix else name for name in ignored]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)  # type: ignore[no-untyped-call]
    strategy.model = module
    strategy.configure_ddp()
    return strategy.model


def _forget_best(trainer: Any) -> None:
    """Have checkpoints by a metric begin again."""
    for callback in trainer.checkpoint_callbacks:
        if callback.monitor is not None:
            worst = math.inf if callback.mode == "min" else -math.inf
            callback.best_k_models, callback.best_model_score = {}, None
            callback.kth_value = torch.tensor(worst)
            callback.best_model_path = callback.kth_best_model_path = ""
