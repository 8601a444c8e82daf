"""A training loop that knows nothing of clicktrain, and the two lines that make it prune.

    python examples/own_loop.py

Trains a small network on scikit-learn's handwritten digits, 8x compressed at the end, in under a minute on a
CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import clicktrain

EPOCHS = 20
BATCH_SIZE = 64


def make_model() -> nn.Module:
    def block(channels: int, filters: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def load_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(digits.target)
    order = torch.randperm(len(y))
    train, val = order[:1437], order[1437:]
    return x[train], y[train], x[val], y[val]


def main() -> None:
    torch.manual_seed(0)
    x_train, y_train, x_val, y_val = load_images()
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    batches = len(y_train) // BATCH_SIZE

    # The first line. `print(pruner.plan())` shows what it will do.
    pruner = clicktrain.ClickTrain(compression=8).attach(
        model, optimizer, epochs=EPOCHS, steps_per_epoch=batches
    )

    for epoch in range(EPOCHS):
        order = torch.randperm(len(y_train))[: batches * BATCH_SIZE]
        for indices in order.split(BATCH_SIZE):
            loss = F.cross_entropy(model(x_train[indices]), y_train[indices])
            loss.backward()
            pruner.observe(loss)  # the second line: once per backward pass
            optimizer.step()
            optimizer.zero_grad()
            # To average gradients of 4 batches: `(loss / 4).backward()` and `pruner.observe(loss)` for each,
            # the two lines above after every fourth. With a GradScaler: `scaler.scale(loss).backward()`,
            # `pruner.observe(loss)`, `scaler.step(optimizer)`, `scaler.update()`.
        scheduler.step()
        if (epoch + 1) % 5 == 0:
            print(
                f"epoch {epoch + 1:2d}  stage {pruner.stage:11s}  loss {loss.item():.3f}  "
                f"density {pruner.density:.3f}"
            )

    model = pruner.finish()  # a plain module with zeros; pruner.finish(packed=True) keeps the packed form
    model.eval()
    with torch.no_grad():
        accuracy = 100 * (model(x_val).argmax(dim=1) == y_val).float().mean().item()
    print(f"accuracy {accuracy:.1f}%  compression {clicktrain.compression_ratio(model):.2f}x")


if __name__ == "__main__":
    main()
