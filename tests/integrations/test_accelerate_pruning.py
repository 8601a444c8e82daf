"""A loop under Accelerate: gradients that are accumulated, and runs that go on from a saved state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.methods import ClickTrain, PaT, RigL

accelerate = pytest.importorskip("accelerate", reason="pip install 'clicktrain[accelerate]'")

from clicktrain.integrations.accelerate import Pruning  # noqa: E402

EPOCHS, BATCHES = 6, 4
METHODS: dict[str, Any] = {
    "clicktrain": lambda: ClickTrain(compression=3),
    "rigl": lambda: RigL(sparsity=0.6, interval=3, linear=False),
    "pat": lambda: PaT(policy="epoch", prune_epoch=1, prune_ratio=0.4),
}


pytestmark = pytest.mark.filterwarnings("ignore")  # advice about workers, loggers and batch sizes


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def made(method: str, **more: Any) -> Pruning:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # a process has one, otherwise
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return Pruning(
        accelerate.Accelerator(cpu=True, **more), METHODS[method](), model, optimizer,
        epochs=EPOCHS, steps_per_epoch=BATCHES, example=torch.zeros(2, 3, 6, 6),
    )  # fmt: skip


def train(pruning: Pruning, batches: range) -> None:
    for number in batches:
        generator = torch.Generator().manual_seed(number)
        y = torch.randint(0, 3, (8,), generator=generator)
        x = torch.randn(8, 3, 6, 6, generator=generator) + y.view(-1, 1, 1, 1)
        with pruning.accumulate():
            pruning.backward(F.cross_entropy(pruning(x), y))
            pruning.optimizer.step()
            pruning.optimizer.zero_grad()


def weights(pruning: Pruning) -> dict[str, Tensor]:
    return dict(pruning.finish().state_dict())


@pytest.mark.parametrize("at", [6, 18])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_a_saved_state(method: str, at: int, tmp_path: Path) -> None:
    whole = made(method)
    train(whole, range(at))
    whole.accelerator.save_state(str(tmp_path))
    train(whole, range(at, EPOCHS * BATCHES))
    again = made(method)
    again.accelerator.load_state(str(tmp_path))
    train(again, range(at, EPOCHS * BATCHES))
    expected, reached = weights(whole), weights(again)
    assert reached.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(reached[name], value), name


def test_accumulated_gradients_and_low_precision() -> None:
    pruning = made("clicktrain", gradient_accumulation_steps=2, mixed_precision="bf16")
    assert pruning(torch.zeros(1, 3, 6, 6)).dtype is torch.float32
    train(pruning, range(EPOCHS * BATCHES))
    assert pruning.pruner.frozen
    pruning.finish()
    pruning.pruner.check_zeros()


def test_a_prepared_optimizer_is_refused() -> None:
    accelerator, model = accelerate.Accelerator(cpu=True), network()
    optimizer = accelerator.prepare(torch.optim.Adam(model.parameters()))
    with pytest.raises(UserError, match="give the optimizer as it was made"):
        Pruning(accelerator, ClickTrain(), model, optimizer, epochs=2, steps_per_epoch=2)
