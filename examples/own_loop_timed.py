"""Steps of an own loop, dense and after the hard prune, with `accelerate=True`.

    python examples/own_loop_timed.py

ResNet-18 for 32x32 images, batches of 64 random images, one CPU core: two to three minutes, one of which goes
into choosing and building kernels.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

import clicktrain
from clicktrain.models import create_model

EPOCHS, BATCHES, BATCH_SIZE = 4, 10, 64


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=10, stem="cifar").to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = clicktrain.ClickTrain(compression=10).attach(
        model, optimizer, epochs=EPOCHS, steps_per_epoch=BATCHES, accelerate=True
    )
    times: dict[str, list[float]] = {"dense": [], "after the hard prune": []}
    for _ in range(EPOCHS * BATCHES):
        x = torch.randn(BATCH_SIZE, 3, 32, 32).to(memory_format=torch.channels_last)
        y = torch.randint(0, 10, (BATCH_SIZE,))
        begun, fast = time.perf_counter(), pruner.frozen
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()
        times["after the hard prune" if fast else "dense"].append(time.perf_counter() - begun)
    pruner.finish()
    dense, sparse = (statistics.median(seconds) for seconds in times.values())
    print(f"dense {1000 * dense:.0f} ms, after the hard prune {1000 * sparse:.0f} ms: {dense / sparse:.1f}x")


if __name__ == "__main__":
    main()
