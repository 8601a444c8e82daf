"""One of several training processes, run as a script by the tests.

python several_processes.py RANK PROCESSES FOLDER NAME...: trains with each of these methods, in
FOLDER/NAME-PROCESSES.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clicktrain.comm.processes import end
from clicktrain.comm.sync_batch_norm import run_together, synchronized
from clicktrain.methods import METHODS
from clicktrain.train import TrainingInterrupted, from_dict
from clicktrain.train.fit import fit

BASE: dict[str, Any] = {
    "model": "resnet8",
    "width": 0.25,
    "data": "synthetic:classes=4,size=8,train=64,val=20",
    "batch_size": 16,
    "epochs": 4,
    "learning_rate": 0.02,
    "augment": "cifar",
    "sync_batch_norm": True,
    "operators": "reference",
    "threads": 1,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {"ema_decay": 0.9, "recalibrate_norms": 2},
    "clicktrain": {"compression": 3, "distill": 0.5},
    "clicktrain-gradual": {"compression": 3, "second_cycle": "loss"},
    "campfire": {},
    "prunetrain": {"target_flops": 0.7, "interval": 1, "learning_rate": 0.05},
    "prunetrain-clicktrain": {"target_flops": 0.8, "pattern_compression": 2.5, "learning_rate": 0.03},
    "pat": {"prune_ratio": 0.3, "policy": "epoch", "prune_epoch": 1},
    "rigl": {"interval": 2, "granularity": "pattern", "compression": 3, "accumulate": 2},
    "dsr": {"interval": 2},
    "mest": {"interval": 2},
    "granet": {"interval": 2},
    "gmp": {"interval": 2},
    "nm": {},
}
"""Settings of methods; those that are not here run with their defaults."""


OTHERS: dict[str, dict[str, Any]] = {
    "growing": {"method": "prunetrain", "learning_rate": 0.05, "target_flops": 0.6, "interval": 1,
                "dynamic_batch": True, "batch_granularity": 2},
    "local": {"method": "clicktrain", "compression": 3, "sync_batch_norm": False, "lookahead": True},
    "moving": {"method": "rigl", "interval": 2, "granularity": "pattern", "compression": 3, "epochs": 2,
               "operators": "density"},
    "masked": {"method": "rigl", "interval": 2, "packed": False, "clip_grad_norm": 0.5, "epochs": 2,
               "sync_batch_norm": False},
    "masked-dense": {"method": "rigl", "interval": 2, "packed": False, "clip_grad_norm": 0.5, "epochs": 2,
                     "sync_batch_norm": False, "exchange": "dense"},
    "rounded": {"method": "clicktrain", "compression": 3, "exchange_dtype": "bf16"},
}  # fmt: skip
"""Runs that need not be those of one process: memory is each process's own, and so are local norms."""


def settings(name: str, folder: Path) -> dict[str, Any]:
    if name in OTHERS:
        return {**BASE, **OTHERS[name]}
    trained = METHODS[name]().expects_trained
    start = {"initial_weights": str(folder / "dense-1")} if trained else {}
    return {**BASE, "method": name, **start, **SETTINGS.get(name, {})}


def norm(affine: bool) -> nn.BatchNorm2d:
    torch.manual_seed(3)
    made = nn.BatchNorm2d(5, affine=affine, momentum=0.3).double()
    if affine:
        nn.init.uniform_(made.weight, 0.5, 2)
        nn.init.normal_(made.bias)
    return made


def images() -> tuple[Tensor, Tensor]:
    """A batch [7, 5, 3, 4] and what its outputs are multiplied with in the loss."""
    generator = torch.Generator().manual_seed(4)
    x, y = (torch.randn(7, 5, 3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    return 3 * x + 100, y


PARTS = (slice(0, 3), slice(3, 7))
"""Of unequal sizes."""


def norm_of_part(rank: int) -> list[dict[str, Tensor]]:
    """Outputs, gradients and statistics of synchronized norms, with and without scale, on a part."""
    return [normed(synchronized(nn.Sequential(norm(affine)))[0], PARTS[rank]) for affine in (True, False)]


def normed(layer: nn.Module, rows: slice) -> dict[str, Tensor]:
    x, y = (whole[rows].clone() for whole in images())
    x.requires_grad_()
    with run_together():
        output = layer(x)
        (output * y).sum().backward()
    assert x.grad is not None
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    return {"output": output.detach(), "x": x.grad, **gradients, **buffers}


class Stopping(nn.Sequential):
    """Sends SIGTERM to the second process when it is evaluated for the first time after a step."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.has_trained = True
        elif getattr(self, "has_trained", False) and os.environ.get("RANK") == "1":
            self.has_trained = False
            os.kill(os.getpid(), signal.SIGTERM)
        output: Tensor = super().forward(x)
        return output


def stopping(num_classes: int, in_channels: int) -> nn.Module:
    return Stopping(
        nn.Conv2d(in_channels, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, num_classes),
    )


def stop_one(rank: int, folder: Path) -> None:
    """Train until the second process is stopped in an evaluation."""
    data = "synthetic:classes=4,size=8,train=64,val=80"  # each process has two batches of it or more
    values = {**BASE, "method": "dense", "model": "several_processes:stopping", "width": 1.0, "data": data}
    try:
        fit(*from_dict(values), folder / "stopped")
    except TrainingInterrupted as stop:
        end = {"signum": stop.signum, "message": str(stop)}
        (folder / f"stopped-{rank}.json").write_text(json.dumps(end))


def main(rank: int, processes: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(processes),
            "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes),
        }  # fmt: skip
        dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=processes)
        torch.save(norm_of_part(rank), folder / f"norm-{rank}.pt")
        stop_one(rank, folder)
    for name in names:
        summary = fit(*from_dict(settings(name, folder)), folder / f"{name}-{processes}")
        (folder / f"{name}-{processes}-{rank}.json").write_text(json.dumps(dict(summary)))
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    end(0)
