"""A network, an optimizer and a plain training loop that are not the library's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.methods import Pruner

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.05),
    "fused-sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True),
    "fused-adamw": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.05, fused=True),
}


class Net(nn.Module):
    """Kernels of four shapes, 4440 weights to prune."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.square = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.point = nn.Conv2d(16, 8, 1)
        self.large = nn.Conv2d(8, 8, 5, padding=2)
        self.flat = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), stride=2)
        self.deep = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.bn(self.square(x)))
        x = F.relu(self.point(x))
        x = F.relu(self.flat(F.relu(self.large(x)) + x))
        x = F.relu(self.deep(x))
        return self.head(x.mean(dim=(2, 3)))


PRUNED = ("square", "point", "large", "flat", "deep")


def make(seed: int = 0, optimizer: str = "nesterov") -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    return model, OPTIMIZERS[optimizer](model.parameters())


def batches(count: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch number ``n`` is the same whenever it is asked for."""
    for number in range(start, count):
        generator = torch.Generator().manual_seed(number)
        y = torch.randint(0, 4, (4,), generator=generator)
        x = torch.randn(4, 3, 6, 6, generator=generator) + y.view(4, 1, 1, 1) * 0.5
        yield x, y


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pruner: Pruner,
    steps: int,
    *,
    start: int = 0,
    accumulate: int = 1,
    scaler: torch.amp.GradScaler | None = None,
    unscale: bool = False,
    bf16: bool = False,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """What somebody else's loop looks like."""
    for number, (x, y) in enumerate(batches(steps, start), start=start + 1):
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = F.cross_entropy(model(x), y)
        scaled = loss / accumulate
        (scaled if scaler is None else scaler.scale(scaled)).backward()
        pruner.observe(loss)
        if number % accumulate == 0:
            if scaler is None:
                optimizer.step()
            else:
                if unscale:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        if after_step is not None:
            after_step(number)


def entered(pruner: Pruner) -> dict[str, int]:
    """Stage -> batch at which it was entered."""
    return {event["stage"]: event["step"] for event in pruner.events if event["event"] == "stage"}


def conv_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def assert_pruned(
    model: nn.Module, pruner: Pruner, compression: float, names: tuple[str, ...] = PRUNED
) -> None:
    """Masks and zeros agree, filters are equal, and the target is met as closely as one kernel allows."""
    weights = conv_weights(model)
    assert set(pruner.masks) == set(names)
    total = sum(weight.numel() for weight in weights.values())
    nonzero = total - sum(int((~mask).sum()) for mask in pruner.masks.values())
    assert total / nonzero == pytest.approx(pruner.compression_ratio)
    assert nonzero <= round(total / compression)
    for name in names:
        mask = pruner.masks[name]
        assert weights[name][~mask].eq(0).all(), name
        per_filter = mask.flatten(1).sum(dim=1)
        assert (per_filter == per_filter[0]).all(), name
        per_kernel = mask.flatten(2).sum(dim=2)
        entries = int(per_kernel.max())
        assert entries > 0
        assert per_kernel.unique().tolist() in ([entries], [0, entries]), (
            "a kernel has all its entries or none"
        )
        if per_kernel.min() == 0 and name not in pruner.method.layers:
            another = mask.shape[0] * entries
            assert nonzero + another > total / compression - 1, f"another kernel of {name} fits"


def snapshot(model: nn.Module, pruner: Pruner) -> dict[str, Tensor]:
    masks = {f"mask of {name}": mask for name, mask in pruner.masks.items()}
    return {**{name: value.clone() for name, value in model.state_dict().items()}, **masks}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different
