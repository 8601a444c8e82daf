"""The network and the loop of the contract that every method keeps; run as a script, one of two processes.

python contract_loop.py RANK PROCESSES FOLDER: trains every registered method on a share of each batch, and
again exchanging gradients of kept weights only, and writes what the process ends with.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clicktrain.comm import Exchange, KeptExchange, counted, masked_allreduce_hook
from clicktrain.comm.processes import end
from clicktrain.errors import MissedTarget
from clicktrain.formats.tree import load_tree, save_tree
from clicktrain.methods import METHODS, Pruner

EPOCHS, PER_EPOCH, IMAGES, SIZE, CLASSES = 4, 4, 8, 8, 4
TOTAL = EPOCHS * PER_EPOCH


class Net(nn.Module):
    """A stem, a residual block and a head: channels of a stage that go together, channels inside a block."""

    def __init__(self, num_classes: int = CLASSES, in_channels: int = 1) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(in_channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.between = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.two, self.after = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.after(self.two(F.relu(self.between(self.one(x))))))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


def batch(number: int) -> tuple[Tensor, Tensor]:
    """Batch ``number`` is the same whenever it is asked for."""
    generator = torch.Generator().manual_seed(number)
    y = torch.arange(IMAGES) % CLASSES
    return torch.randn(IMAGES, 1, SIZE, SIZE, generator=generator) + y.view(-1, 1, 1, 1), y


@dataclass
class Run:
    """A method attached to the network, trained as far as `train` was asked to."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    pruner: Pruner

    def save(self, path: Path) -> None:
        """Write all that a loop saves, as a file that cannot execute anything."""
        parts = {"model": self.model, "optimizer": self.optimizer, "pruner": self.pruner}
        save_tree(path, {name: part.state_dict() for name, part in parts.items()}, {})

    def load(self, path: Path) -> None:
        """Go on from a file of `save`: the pruner first, which gives the network its shapes."""
        saved = load_tree(path)
        self.pruner.load_state_dict(saved["pruner"])
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def train(
        self,
        start: int = 0,
        *,
        wrap: Callable[[nn.Module], Any] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        accumulate: int = 1,
        share: tuple[int, int] = (0, 1),
        after: Callable[[int], None] = lambda done: None,
    ) -> Run:
        """Train from batch ``start`` to the last one, as anybody's loop does.

        Args:
            start: batches done.
            wrap: makes what the loop calls from the network.
            scaler: multiplies the loss.
            accumulate: batches per optimizer step.
            share: which of how many parts of each batch.
            after: called after every optimizer step, with the batches done.
        """
        forward = self.model if wrap is None else self.pruner.wrapped(wrap)
        for number in range(start, TOTAL):
            x, y = (part.chunk(share[1])[share[0]] for part in batch(number))
            loss = F.cross_entropy(forward(x), y)
            scaled = loss / accumulate if scaler is None else scaler.scale(loss / accumulate)
            scaled.backward()
            self.pruner.observe(loss)
            if (number + 1) % accumulate:
                continue
            if scaler is None:
                self.optimizer.step()
            else:
                scaler.step(self.optimizer)
                scaler.update()
            self.optimizer.zero_grad()
            after(number + 1)
        return self

    def finish(self, packed: bool = False) -> list[str]:
        """End the run; the targets that were missed, in words."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MissedTarget)
            assert self.pruner.finish(packed=packed) is self.model
        return [str(one.message) for one in caught if one.category is MissedTarget]

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers, as they are now."""
        return {key: value.clone().contiguous() for key, value in self.model.state_dict().items()}


def attach(name: str, *, seed: int = 0, packed: bool = False) -> Run:
    """Attach a method with its default settings to a fresh network.

    The optimizer is a fused one: a `GradScaler` leaves the gradients scaled for it.
    """
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    method = METHODS[name]()
    pruner = method.attach(
        model, optimizer, epochs=EPOCHS, steps_per_epoch=PER_EPOCH, packed=packed, example=batch(0)[0]
    )
    return Run(model, optimizer, pruner)


def starting_weights(name: str, folder: Path) -> tuple[str, ...]:
    """Words of the command line for methods that prune a trained network; none for the others."""
    if not METHODS[name]().expects_trained:
        return ()
    torch.manual_seed(0)
    path = folder / "trained.safetensors"
    save_file(Net().state_dict(), path)
    return ("--initial-weights", str(path))


def without_times(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Decisions without what a clock says."""
    return [{k: v for k, v in event.items() if "seconds" not in k and "_ms" not in k} for event in events]


def main(rank: int, processes: int, folder: Path) -> None:
    """Train every method, each process on its share; write weights and decisions, or what went wrong."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=processes)
    for name in METHODS:
        for kept in (False, True):
            share(name, rank, processes, folder, kept)
    dist.destroy_process_group()


def share(name: str, rank: int, processes: int, folder: Path, kept: bool) -> None:
    """Train a method; ``kept``: only gradients of kept weights travel, and what travels is counted."""
    run, steps, before = attach(name), [], 0
    sent: Exchange = {}
    torch.manual_seed(rank)  # weights are alike, whatever else is drawn is not

    def wrap(network: nn.Module) -> DistributedDataParallel:
        wrapper = DistributedDataParallel(network)
        if kept:
            wrapper.register_comm_hook(KeptExchange(run.pruner), masked_allreduce_hook)
        return wrapper

    def after(done: int) -> None:
        nonlocal before
        now = sum(sent[purpose][0] for purpose in ("gradients", "growth") if purpose in sent)
        steps.append(now - before)
        before = now

    with counted(sent):
        run.train(wrap=wrap, share=(rank, processes), after=after)
    run.finish()
    plans = [plan.to_json() for plan in run.pruner.plans]
    decided = {"plans": plans, "events": without_times(run.pruner.events)}
    stem = f"{name}-kept-{rank}" if kept else f"{name}-{rank}"
    (folder / f"{stem}.json").write_text(json.dumps(decided))
    save_file(run.weights(), folder / f"{stem}.safetensors")
    if kept:
        weights = sum(parameter.numel() for parameter in run.model.parameters())
        masked = {layer: [mask.numel(), int(mask.sum())] for layer, mask in run.pruner.masks.items()}
        sizes = {"steps": steps, "weights": weights, "masks": masked}
        (folder / f"{stem}-sizes.json").write_text(json.dumps(sizes))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    end(0)
