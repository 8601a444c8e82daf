"""Python calls in a training step after the hard prune: each costs as much as a small kernel."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clicktrain import ClickTrain, accelerate
from clicktrain.compiler import Accelerated
from clicktrain.kernels.native import toolchain

pytestmark = pytest.mark.skipif(toolchain() is None, reason="needs a C compiler")
PAIR = 70
"""Most calls for a convolution and its batch norm: forward, backward and hooks. It takes 58 here; it took
172 when the types of arguments were compared one by one."""


def chain(pairs: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()]
    for _ in range(pairs):
        layers += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def calls_per_step(pairs: int) -> int:
    """Of one step in stage 5 with the pruner's hooks, in the middle of an epoch."""
    torch.manual_seed(0)
    model = chain(pairs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = ClickTrain(compression=3).attach(model, optimizer, epochs=5, steps_per_epoch=4, packed=True)
    x, y = torch.randn(16, 3, 8, 8), torch.randint(3, (16,))
    network: nn.Module = model
    calls = 0

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        pruner.observe(loss)
        optimizer.step()

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        calls += event == "call" and "/clicktrain/" in frame.f_code.co_filename.replace("\\", "/")

    while not pruner.frozen:
        step()
    network = accelerate(model, x, rule="sparse")
    assert isinstance(network, Accelerated)
    assert all(choice.layout == "blocked" for choice in network.plan.choices if choice.kind == "conv")
    step()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(before)
    pruner.close()
    return calls


def test_a_layer_costs_few_calls() -> None:
    few, many = calls_per_step(1), calls_per_step(4)
    assert (many - few) / 3 <= PAIR
    assert few <= 3 * PAIR  # one pair, and whatever a step does once
