"""Lightning, automatic optimization, and the one line that makes its Trainer prune.

    python examples/lightning_digits.py
    torchrun --nproc-per-node=2 examples/lightning_digits.py

Trains a small network on scikit-learn's handwritten digits, 8x compressed at the end.
"""

from __future__ import annotations

import os
import sys

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from own_loop import load_images, make_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import clicktrain
from clicktrain.integrations.lightning import PruningCallback

EPOCHS = 20
BATCH_SIZE = 64
"""Images of one step in all processes."""


class Digits(pl.LightningModule):
    """Knows nothing of clicktrain."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.network = make_model()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.network(x).argmax(dim=1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs),
        }


def main(epochs: int = EPOCHS) -> nn.Module:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    pl.seed_everything(0, verbose=False)
    x_train, y_train, x_val, y_val = load_images()
    loader = DataLoader(
        TensorDataset(x_train, y_train), BATCH_SIZE // processes, shuffle=True, drop_last=True
    )
    module = Digits(epochs)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        callbacks=[PruningCallback(clicktrain.ClickTrain(compression=8))],  # the line
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, loader, DataLoader(TensorDataset(x_val, y_val), len(y_val)))
    if trainer.is_global_zero:
        accuracy = 100 * float(trainer.callback_metrics["accuracy"])
        ratio = clicktrain.compression_ratio(module.network)
        print(f"accuracy {accuracy:.1f}%  compression {ratio:.2f}x  processes {processes}")
    return module.network


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
