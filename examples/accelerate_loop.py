"""A training loop under Hugging Face Accelerate, and the lines that make it prune.

    python examples/accelerate_loop.py                                 # one process
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
    torchrun --nproc-per-node=2 examples/accelerate_loop.py

Trains a small network on scikit-learn's handwritten digits, 8x compressed at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from own_loop import load_images, make_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clicktrain
from clicktrain.integrations.accelerate import Pruning

EPOCHS = 20
BATCH_SIZE = 64
"""Images of one step in all processes."""


def main(epochs: int = EPOCHS) -> nn.Module:
    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    torch.manual_seed(0)
    x_train, y_train, x_val, y_val = load_images()
    loader = DataLoader(TensorDataset(x_train, y_train), BATCH_SIZE, shuffle=True, drop_last=True)
    loader = accelerator.prepare(loader)  # each process's part of every batch
    model = make_model().to(accelerator.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    # The first line: the network itself and its own optimizer, before Accelerate wraps anything.
    pruning = Pruning(
        accelerator,
        clicktrain.ClickTrain(compression=8),
        model,
        optimizer,
        epochs=epochs,
        steps_per_epoch=len(loader),
    )

    for epoch in range(epochs):
        model.train()
        for x, y in loader:
            loss = F.cross_entropy(pruning(x), y)  # instead of model(x)
            pruning.backward(loss)  # instead of accelerator.backward(loss)
            pruning.optimizer.step()
            pruning.optimizer.zero_grad()
        scheduler.step()
        if (epoch + 1) % 5 == 0:
            accelerator.print(
                f"epoch {epoch + 1:2d}  stage {pruning.pruner.stage:11s}  loss {loss.item():.3f}  "
                f"density {pruning.pruner.density:.3f}"
            )

    model = pruning.finish()  # every process; with the same weights in all of them
    model.eval()
    with torch.no_grad():
        right = (model(x_val.to(accelerator.device)).argmax(dim=1).cpu() == y_val).float().mean().item()
    accelerator.print(
        f"accuracy {100 * right:.1f}%  compression {clicktrain.compression_ratio(model):.2f}x  "
        f"processes {accelerator.num_processes}"
    )
    accelerator.end_training()
    return model


if __name__ == "__main__":
    main()
