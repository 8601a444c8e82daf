"""Python calls of the library per training step: what a stage costs beside the tensors' own work.

Calls are counted, not timed: the numbers are the same on every machine. Before masks of pools and facts about
layers were kept between steps, a step of stage 3 made 1106 calls here, one of stage 2 816.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import clicktrain
from clicktrain.methods import ClickTrain
from clicktrain.models import create_model

PACKAGE = str(Path(clicktrain.__file__).parent)
STEPS = 24
MOST = {"dense": 200, "pool": 500, "finalize": 350, "regularize": 247, "accelerated": 350}
"""Calls of a step that stays within its stage."""
EARLY = 20 * 7
"""More of them in stages 2 and 3 if positions outside the candidates are penalized: 7 a layer."""


def count_calls(function: Callable[[], object]) -> int:
    """Calls of functions that are defined in the library."""
    calls = 0

    def note(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.filterwarnings("ignore::clicktrain.errors.MissedTarget")
@pytest.mark.parametrize("preset", ["default", "paper", "one-shot"])
def test_a_step_makes_few_python_calls(preset: Any) -> None:
    sixth = 1 / 6
    lengths = dict.fromkeys(("pool_length", "finalize_length", "regularize_length"), sixth)
    method = ClickTrain(preset=preset, earliest_start=sixth, latest_start=sixth, **lengths)
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=4, width=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = method.attach(model, optimizer, epochs=1, steps_per_epoch=STEPS)
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        pruner.observe(loss)
        optimizer.step()

    calls: dict[str, list[int]] = defaultdict(list)
    for _ in range(STEPS):
        before = pruner.stage
        made = count_calls(step)
        if pruner.stage == before:
            calls[before].append(made)
    # The first step of a stage also prepares it, the last one of an epoch also closes that.
    steady = {stage: sorted(counts)[len(counts) // 2] for stage, counts in calls.items()}
    assert {"dense", "finalize", "accelerated"} <= steady.keys()
    more = {"pool": EARLY, "finalize": EARLY} if method.early_penalty != "none" else {}
    assert all(count <= MOST[stage] + more.get(stage, 0) for stage, count in steady.items()), steady
