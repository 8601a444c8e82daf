"""Count the Python calls of the library in one training step of ClickTrain, stages 3 and 5, by file.

python scripts/step_calls.py

ResNet-20 at a quarter of its width, 2 images of 8x8; stage 5 runs on `clicktrain.accelerate`.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F

import clicktrain
from clicktrain.models import create_model

PACKAGE = str(Path(clicktrain.__file__).parent)
STEPS = 24


def files_called(function: Callable[[], object]) -> Counter[str]:
    """File of the library -> calls of its functions."""
    calls: Counter[str] = Counter()

    def note(frame: FrameType, event: str, arg: Any) -> None:
        del arg
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(PACKAGE):
            calls[name.removeprefix(PACKAGE + "/")] += 1

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


def main() -> None:
    """Train through all stages and print the counts."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    third = 1 / 3
    method = clicktrain.ClickTrain(
        compression=4, earliest_start=0.1, latest_start=0.1, pool_length=0.1, finalize_length=third,
        regularize_length=0.1,
    )  # fmt: skip
    model = create_model("resnet20", num_classes=4, width=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = method.attach(model, optimizer, epochs=1, steps_per_epoch=STEPS, packed=True)
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    forward: Callable[[torch.Tensor], torch.Tensor] = model

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x), y)
        loss.backward()
        pruner.observe(loss)
        optimizer.step()

    counted: dict[str, Counter[str]] = {}
    for _ in range(STEPS - 1):
        if pruner.stage == "accelerated" and forward is model:
            forward = clicktrain.accelerate(model, x, rule="sparse")
            step()  # the first call compiles
        before = pruner.stage
        calls = files_called(step)
        if pruner.stage == before and (before not in counted or calls.total() < counted[before].total()):
            counted[before] = calls
    for stage in ("finalize", "accelerated"):
        calls = counted[stage]
        print(f"{stage}: {calls.total()} calls in {len(calls)} files")
        for name, count in calls.most_common():
            print(f"  {count:5d}  {name}")


if __name__ == "__main__":
    main()
