"""A training loop under Lightning Fabric, and the two lines that make it prune.

    python examples/fabric_loop.py                              # one process
    fabric run --devices=2 --strategy=ddp examples/fabric_loop.py
    torchrun --nproc-per-node=2 examples/fabric_loop.py

Trains a small network on scikit-learn's handwritten digits, 8x compressed at the end.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from own_loop import load_images, make_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import clicktrain

EPOCHS = 20
BATCH_SIZE = 64
"""Images of one step in all processes."""


def main(epochs: int = EPOCHS) -> nn.Module:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto")
    fabric.launch()
    torch.manual_seed(0)
    x_train, y_train, x_val, y_val = load_images()
    images = TensorDataset(x_train, y_train)
    loader = DataLoader(images, BATCH_SIZE // fabric.world_size, shuffle=True, drop_last=True)
    loader = fabric.setup_dataloaders(loader)  # each process's part
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    # The first line: the network itself and its own optimizer, before Fabric wraps anything.
    pruner = clicktrain.ClickTrain(compression=8).attach(
        model, optimizer, epochs=epochs, steps_per_epoch=len(loader), packed=True
    )

    # Weights are replaced when they are packed: the pruner has Fabric wrap the network then again.
    forward = pruner.wrapped(fabric.setup_module)
    optimizer = fabric.setup_optimizers(optimizer)

    for epoch in range(epochs):
        model.train()
        for x, y in loader:
            loss = F.cross_entropy(forward(x), y)
            fabric.backward(loss)
            pruner.observe(loss)  # the second line: once per backward pass
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
        if (epoch + 1) % 5 == 0:
            fabric.print(
                f"epoch {epoch + 1:2d}  stage {pruner.stage:11s}  loss {loss.item():.3f}  "
                f"density {pruner.density:.3f}"
            )

    model = pruner.finish()  # every process; with the same weights in all of them
    model.eval()
    with torch.no_grad():
        right = (model(x_val).argmax(dim=1) == y_val).float().mean().item()
    fabric.print(
        f"accuracy {100 * right:.1f}%  compression {clicktrain.compression_ratio(model):.2f}x  "
        f"processes {fabric.world_size}"
    )
    return model


if __name__ == "__main__":
    main()
