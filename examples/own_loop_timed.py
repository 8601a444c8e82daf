"""Steps of an own loop with `accelerate=True`: stage by stage, and beside those of a dense network.

    python examples/own_loop_timed.py

ResNet-18 for 32x32 images, batches of 64 random images, one CPU core: two to four minutes, one of which goes
into choosing and building kernels. After the hard prune a dense network takes a step after each step of the
pruned one, so that whatever else the machine does hits both. `--bf16` trains both under autocast. `--model
resnet8 --width 0.25 --image 8 --batch 8 --batches 4` is done in seconds and says nothing about speed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clicktrain
from clicktrain.latency.machine import cpu_name
from clicktrain.models import create_model

FROZEN = "accelerated"
"""Name of ClickTrain's last stage."""


def seconds_of(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def loss_of(model: nn.Module, x: Tensor, y: Tensor, bf16: bool) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        return F.cross_entropy(model(x), y)


def row(name: str, seconds: list[float]) -> str:
    ms = sorted(1000 * one for one in seconds)
    half = f"{ms[len(ms) // 4]:.1f} to {ms[3 * len(ms) // 4]:.1f}"
    return f"{name:<34} {len(ms):>5} {statistics.median(ms):>10.1f}   {half}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--image", type=int, default=32, help="side in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=10, help="of each of 4 epochs")
    parser.add_argument("--compression", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="autocast to bf16 in both networks")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    sides = (given.batch, 3, given.image, given.image)

    def network() -> tuple[nn.Module, torch.optim.Optimizer]:
        made = create_model(given.model, num_classes=10, width=given.width, stem="cifar")
        made = made.to(memory_format=torch.channels_last)
        return made, torch.optim.SGD(made.parameters(), lr=0.01, momentum=0.9)

    twin, twin_optimizer = network()
    model, optimizer = network()
    epochs = 4
    pruner = clicktrain.ClickTrain(compression=given.compression).attach(
        model, optimizer, epochs=epochs, steps_per_epoch=given.batches, accelerate=True
    )

    def step(x: Tensor, y: Tensor) -> None:
        loss = loss_of(model, x, y, given.bf16)
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()

    def dense_step(x: Tensor, y: Tensor) -> None:
        loss_of(twin, x, y, given.bf16).backward()
        twin_optimizer.step()
        twin_optimizer.zero_grad()

    times: dict[str, list[float]] = {}
    beside: list[float] = []
    for _ in range(epochs * given.batches):
        x = torch.randn(sides).to(memory_format=torch.channels_last)
        y = torch.randint(0, 10, (given.batch,))
        stage = pruner.stage
        times.setdefault(stage, []).append(seconds_of(lambda x=x, y=y: step(x, y)))
        if stage == FROZEN:
            beside.append(seconds_of(lambda x=x, y=y: dense_step(x, y)))
    pruner.finish()

    chosen, *fast = times.pop(FROZEN)
    print(f"{cpu_name()}, {given.threads} thread(s), torch {torch.__version__}")
    print(
        f"{given.model}, width {given.width:g}, {given.batch} images of {given.image}x{given.image}, "
        f"{'bf16 autocast' if given.bf16 else 'fp32'}, channels_last; "
        f"compression {clicktrain.compression_ratio(model):.2f}x\n"
    )
    print(f"{'step':<34} {'steps':>5} {'median ms':>10}   middle half")
    for name, seconds in times.items():
        print(row(f"pruned network, stage {name}", seconds))
    print(row("after the hard prune", fast))
    print(row("a dense network beside it", beside[1:]))
    ratio = statistics.median(beside[1:]) / statistics.median(fast)
    print(f"\nfirst step after the hard prune, which chooses and builds kernels: {chosen:.1f} s")
    print(f"steps after the hard prune are {ratio:.2f}x as fast as the dense ones beside them")


if __name__ == "__main__":
    main()
