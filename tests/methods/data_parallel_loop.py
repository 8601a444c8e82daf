"""A training loop of one process among several (or alone), run as a script by the tests.

python data_parallel_loop.py RANK PROCESSES FOLDER: for each of `METHODS` every process trains on its share of
each batch and writes what it ends with; and what the processes hear from each other.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clicktrain import ClickTrain, PruneTrain
from clicktrain.comm.agreement import agree_on_, agreed, agreed_text, mean_over_processes
from clicktrain.comm.processes import end
from clicktrain.errors import UserError
from clicktrain.methods import DSR, RigL

STEPS, EPOCHS, BATCH = 4, 6, 8


def network() -> nn.Module:
    """Without batch norm: then the shares of a batch give the gradients of the whole."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def normed() -> nn.Module:
    """With batch norm, whose statistics differ from process to process."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


@torch.no_grad()
def unlike_(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    """Channels that the first process takes for dead, and the second one only without its statistics."""
    convolution, norm = model.get_submodule("0"), model.get_submodule("1")
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    for weight in (convolution.weight, norm.weight, norm.bias):
        assert weight.grad is not None
        for tensor in (weight, weight.grad, optimizer.state[weight]["momentum_buffer"]):
            tensor[:3] = 0
    norm.weight[:3] = 1e-6
    norm.running_mean[:3] = -1e6 * rank


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    y = torch.randint(0, 4, (BATCH,), generator=generator)
    return torch.randn(BATCH, 3, 6, 6, generator=generator) + y.view(BATCH, 1, 1, 1) * 0.5, y


METHODS: dict[str, Any] = {
    "channels": PruneTrain(penalty_ratio=0.7, interval=1),
    "normed": PruneTrain(coefficient=0.05, interval=1, round_to="auto"),
    "packed": ClickTrain(compression=3, patterns=4),
    "rigl": RigL(sparsity=0.6, interval=2),
    "dsr": DSR(sparsity=0.6, interval=1),
    "moving": RigL(sparsity=0.7, interval=2),
    "moving-dsr": DSR(sparsity=0.7, interval=2, growth="gradient"),
}
PACKED = ("packed", "moving", "moving-dsr")


def agreement(rank: int) -> dict[str, Any]:
    """What each process hears when it says something of its own."""
    cpu, mask, weights = (
        torch.device("cpu"),
        torch.tensor([rank == 0, True]),
        torch.full((2, 3), float(rank)).T,
    )
    agree_on_([mask, weights])
    return {
        "numbers": agreed([0.1 + rank, 2.0], cpu),
        "text": agreed_text(f"pröcess {rank}" + "!" * rank, cpu),
        "mask": mask.tolist(),
        "weights": weights.tolist(),
        "mean": float(mean_over_processes(torch.tensor(float(rank)))),
    }


def main(rank: int, processes: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=processes)
    (folder / f"agreement-{rank}.json").write_text(json.dumps(agreement(rank)))
    for name in METHODS:
        train(name, rank, processes, folder)
    if processes > 1:
        refused = {"not wrapped": unlike_gradients(rank, False), "wrapped once": unlike_gradients(rank, True)}
        (folder / f"refused-{rank}.json").write_text(json.dumps(refused))
    if processes > 1:
        dist.destroy_process_group()


def unlike_gradients(rank: int, wrapped: bool) -> list[Any]:
    """Steps made, and what is said then, where no wrapper averages all gradients."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = METHODS["packed"].attach(model, optimizer, epochs=EPOCHS, steps_per_epoch=STEPS, packed=True)
    forward = DistributedDataParallel(model) if wrapped else model
    for number in range(EPOCHS * STEPS):
        x, y = (part.chunk(2)[rank] for part in batch(number))
        loss = F.cross_entropy(forward(x), y)
        loss.backward()
        pruner.observe(loss)
        try:
            optimizer.step()
        except UserError as error:
            return [number, str(error)]
        optimizer.zero_grad()
    return [EPOCHS * STEPS, ""]


def train(name: str, rank: int, processes: int, folder: Path) -> None:
    model = normed() if name == "normed" else network()
    torch.manual_seed(rank)  # weights are alike, whatever else is drawn is not
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = METHODS[name].attach(
        model, optimizer, epochs=EPOCHS, steps_per_epoch=STEPS, packed=name in PACKED
    )
    wraps = []

    def wrap(module: nn.Module) -> Any:
        wraps.append(sum(parameter.numel() for parameter in module.parameters()))
        if processes == 1:
            return module
        return DistributedDataParallel(module, broadcast_buffers=name != "normed")

    forward = pruner.wrapped(wrap)
    for number in range(EPOCHS * STEPS):
        x, y = (part.chunk(processes)[rank] for part in batch(number))
        loss = F.cross_entropy(forward(x), y)
        loss.backward()
        pruner.observe(loss)
        if name == "normed" and number == 2 * STEPS - 1:
            unlike_(model, optimizer, rank)
        optimizer.step()
        optimizer.zero_grad()
    pruner.finish()
    told = {
        "wraps": wraps,
        "plans": [plan.to_json() for plan in pruner.plans],
        "events": [{k: v for k, v in e.items() if k != "seconds"} for e in pruner.events],
    }
    (folder / f"{name}-{rank}.json").write_text(json.dumps(told))
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / f"{name}-{rank}.safetensors")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    end(0)
