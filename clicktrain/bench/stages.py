"""The cost of choosing patterns: steps of ClickTrain's stages beside the dense step (section 4)."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.bench.timing import to_json as to_json
from clicktrain.errors import UserError
from clicktrain.methods import ClickTrain, Dense, Method, Pruner
from clicktrain.models import create_model

MEASURED = ("dense", "pool", "finalize", "regularize", "accelerated")


@dataclass(frozen=True, slots=True)
class StageRow:
    """Median milliseconds of a step in one stage, of the dense step beside it, and their ratio."""

    stage: str
    steps: int
    dense_ms: float
    stage_ms: float
    ratio: float


class _Side:
    """One model with its optimizer and pruner, stepped on the same batch."""

    def __init__(self, method: Method[Any], model: nn.Module, batches: int) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        self.pruner: Pruner = method.attach(model, self.optimizer, epochs=1, steps_per_epoch=batches)

    def step_ms(self, x: Tensor, y: Tensor) -> float:
        """Wall-clock milliseconds of one training step, the device waited for."""
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.pruner.observe(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if x.is_cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3


def bench_stages(
    model: str = "resnet18",
    *,
    method: ClickTrain,
    batch_size: int = 64,
    image_size: int = 32,
    steps: int = 7,
    device: str = "cpu",
    seed: int = 0,
) -> list[StageRow]:
    """Time steps of every stage, each beside a dense step on the same batch.

    ``model`` is a zoo name; a CIFAR stem is used up to 64 pixels. The stage lengths of ``method`` are
    replaced so that every stage lasts ``steps`` steps, at least 3, and one more that is not counted.
    """
    if steps < 3:
        raise UserError(f"steps must be at least 3 for a median, not {steps}")
    share = 1 / (len(MEASURED) + 1)
    total = (steps + 1) * (len(MEASURED) + 1)
    timed = replace(
        method,
        earliest_start=share,
        latest_start=share,
        pool_length=share,
        finalize_length=share,
        regularize_length=share,
    )
    stem = "cifar" if image_size <= 64 else "imagenet"

    def side(of: Method[Any]) -> _Side:
        torch.manual_seed(seed)
        return _Side(of, create_model(model, num_classes=10, stem=stem).to(device), total)

    dense, pruned = side(Dense()), side(timed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch_size, 3, image_size, image_size, generator=generator).to(device)
    y = torch.randint(10, (batch_size,), generator=generator).to(device)
    times: dict[str, list[tuple[float, float]]] = {stage: [] for stage in MEASURED}
    for _ in range(total):
        stage = pruned.pruner.stage
        times[stage].append((dense.step_ms(x, y), pruned.step_ms(x, y)))
    return [_row(stage, pairs[1:]) for stage, pairs in times.items() if len(pairs) > 3]


def _row(stage: str, pairs: list[tuple[float, float]]) -> StageRow:
    dense = statistics.median(pair[0] for pair in pairs)
    own = statistics.median(pair[1] for pair in pairs)
    # Pairs are neighbors in time: the median of their ratios is steadier than the ratio of medians.
    ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
    return StageRow(stage, len(pairs), dense, own, ratio)
