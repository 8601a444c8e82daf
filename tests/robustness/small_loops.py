"""Small networks, batches, optimizers and loops for the tests of somebody else's training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from clicktrain.methods import (
    DSR,
    GMP,
    MEST,
    METHODS,
    NM,
    AdmmPatterns,
    Campfire,
    ChannelsThenPatterns,
    ClickTrain,
    Dense,
    GradualClickTrain,
    GraNet,
    Method,
    PaT,
    Pruner,
    PruneTrain,
    RigL,
)

EPOCHS, PER_EPOCH, IMAGES, CLASSES = 6, 4, 8, 3

METHODS_MADE: dict[str, Callable[[], Method[Any]]] = {
    "dense": Dense,
    "clicktrain": lambda: ClickTrain(compression=3),
    "prunetrain": lambda: PruneTrain(coefficient=0.03, interval=1),
    "prunetrain-clicktrain": lambda: ChannelsThenPatterns(
        coefficient=0.001, interval=1, pattern_compression=2
    ),
    "campfire": lambda: Campfire(sparsity=0.6, granularity="ck", era=(1, 3), linear="none"),
    "dsr": lambda: DSR(sparsity=0.5, interval=4, linear=False),
    "rigl": lambda: RigL(sparsity=0.5, interval=4, linear=False),
    "granet": lambda: GraNet(sparsity=0.5, interval=4, linear=False),
    "mest": lambda: MEST(sparsity=0.5, interval=4, linear=False),
    "gmp": lambda: GMP(sparsity=0.5, linear=False),
    "nm": lambda: NM(linear=False),
    "clicktrain-gradual": lambda: GradualClickTrain(compression=2, interval=4),
    "admm-patterns": lambda: AdmmPatterns(compression=2.5),
    "pat": lambda: PaT(policy="epoch", prune_epoch=1, prune_ratio=0.3),
}
assert METHODS_MADE.keys() == METHODS.keys()

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD momentum nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "SGD maximize": lambda p: torch.optim.SGD(p, lr=0.05, maximize=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW foreach amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "RMSprop centered": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.05),
    "LBFGS": torch.optim.LBFGS,
}


class Net(nn.Module):
    """Three convolutions, two of which may be pruned, and a head; 3x3 and 1x1 kernels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.point = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.norm2(self.body(x)))
        return self.head(F.relu(self.point(x)).mean((2, 3)))


def batch(number: int, images: int = IMAGES) -> tuple[Tensor, Tensor]:
    """Batch ``number`` is the same whenever it is asked for."""
    generator = torch.Generator().manual_seed(number)
    y = torch.randint(0, CLASSES, (images,), generator=generator)
    return torch.randn(images, 3, 6, 6, generator=generator) + y.view(-1, 1, 1, 1), y


def network(seed: int = 0) -> Net:
    """The same weights whenever it is asked for."""
    torch.manual_seed(seed)
    return Net()


def sgd(model: nn.Module) -> Optimizer:
    """What most tests train with."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def attached(method: Method[Any], model: nn.Module, optimizer: Any, **more: Any) -> Pruner:
    """For the run that `train` makes."""
    settings = {"epochs": EPOCHS, "steps_per_epoch": PER_EPOCH, **more}
    if method.reads_graph:
        settings.setdefault("example", batch(0)[0])
    return method.attach(model, optimizer, **settings)


def train(
    model: nn.Module,
    pruner: Pruner,
    optimizers: Optimizer | list[Optimizer] | None = None,
    *,
    batches: range = range(EPOCHS * PER_EPOCH),
    after_step: Callable[[int], None] = lambda _: None,
) -> None:
    """Backward, observe, step, as everybody does."""
    stepped = pruner.optimizers if optimizers is None else optimizers
    for number in batches:
        x, y = batch(number)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        pruner.observe(loss)
        for optimizer in [stepped] if isinstance(stepped, Optimizer) else stepped:
            optimizer.step()
            optimizer.zero_grad()
        after_step(number)
