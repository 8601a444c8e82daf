"""The parts of the loop by themselves: optimizer, average, cost, losses, evaluation, disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_networks import plain, tiny
from torch import nn

from clicktrain.data import Batch
from clicktrain.errors import UserError
from clicktrain.train.averages import make_average
from clicktrain.train.checkpoint import bytes_needed, check_disk
from clicktrain.train.config import RunConfig
from clicktrain.train.device import autocast, resolve_device, seed_batch
from clicktrain.train.evaluate import evaluate
from clicktrain.train.interrupt import LossWatch, explosion
from clicktrain.train.optim import make_optimizer
from clicktrain.train.state import EpochTotals, TrainState

CPU = torch.device("cpu")


def test_weight_decay_can_leave_norms_and_biases_alone() -> None:
    model = tiny(10, 1)
    (everything,) = make_optimizer(model, RunConfig()).param_groups
    assert everything["weight_decay"] == 5e-4
    assert len(everything["params"]) == len(list(model.parameters()))
    config = RunConfig(decay_norm_and_bias=False, optimizer="adamw", learning_rate=0.01)
    decayed, free = make_optimizer(model, config).param_groups
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in free["params"]} == {1}
    assert (decayed["weight_decay"], free["weight_decay"]) == (5e-4, 0)
    assert decayed["betas"] == (0.9, 0.999)


def test_average_by_hand() -> None:
    model = nn.BatchNorm1d(1)
    average = make_average(model, 0.2)
    values = [1.0, 2.0, 4.0]
    for number, value in enumerate(values):
        with torch.no_grad():
            model.weight.fill_(value)
            assert model.running_mean is not None
            model.running_mean.fill_(value)
            assert model.num_batches_tracked is not None
            model.num_batches_tracked.fill_(number)
        average.update_parameters(model)
    # First a copy; then the decay is min(0.2, 2 / 11) and min(0.2, 3 / 12).
    expected = 1.0
    for decay, value in ((2 / 11, 2.0), (0.2, 4.0)):
        expected = decay * expected + (1 - decay) * value
    assert average.module.weight.item() == pytest.approx(expected)
    assert average.module.running_mean.item() == pytest.approx(expected)  # type: ignore[union-attr, operator]
    assert average.module.num_batches_tracked.item() == 2  # type: ignore[union-attr, operator]


def test_losses_are_read_in_bundles() -> None:
    seen: list[list[float]] = []
    watch = LossWatch(3, lambda losses, correct: seen.append([*losses, *correct]))
    for number in range(4):
        read = watch.add(torch.tensor(float(number)), torch.tensor(number))
        assert read == (number == 2)
    watch.flush()
    watch.flush()
    assert seen == [[0, 1, 2, 0, 1, 2], [3, 3]]


@pytest.mark.parametrize(
    ("loss", "reference", "words"),
    [
        (math.nan, None, "the loss is nan"),
        (math.inf, 2.0, "the loss is inf"),
        (2.1e4, 2.0, "the loss is 2.1e+04, that of the first epoch was 2"),
        (1.9e4, 2.0, None),
        (1e9, None, None),
        (5.0, 0.0, None),
    ],
)
def test_what_counts_as_explosion(loss: float, reference: float | None, words: str | None) -> None:
    assert explosion(loss, reference) == words


class Images:
    """Images that are their own logits."""

    def __init__(self, logits: torch.Tensor, y: torch.Tensor, batch: int) -> None:
        self.logits, self.y, self.batch = logits, y, batch

    def __len__(self) -> int:
        return math.ceil(len(self.y) / self.batch)

    def epoch(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        for start in range(0, len(self.y), self.batch):
            yield Batch(self.logits[start : start + self.batch], self.y[start : start + self.batch])


@pytest.mark.parametrize("classes", [4, 12])
def test_evaluation_against_the_definition(classes: int) -> None:
    logits, y = torch.randn(33, classes), torch.randint(classes, (33,))
    model = nn.Sequential(nn.Dropout(0.9))  # eval mode, or nothing would be right
    model.train()
    result = evaluate(model, Images(logits, y, 10), device=CPU)  # type: ignore[arg-type]
    assert result is not None
    assert result.accuracy == pytest.approx(100 * (logits.argmax(1) == y).float().mean().item())
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, y).item())
    assert result.images == 33
    if classes < 10:
        assert result.top5_accuracy is None
    else:
        best = logits.argsort(1, descending=True)[:, :5]
        right = sum(int(y[i]) in best[i].tolist() for i in range(33))
        assert result.top5_accuracy == pytest.approx(100 * right / 33)
    assert model.training


def test_evaluation_stops_when_asked_to() -> None:
    images = Images(torch.randn(30, 4), torch.randint(4, (30,)), 10)
    answers = iter([False, True])
    result = evaluate(nn.Identity(), images, device=CPU, stop=lambda: next(answers))  # type: ignore[arg-type]
    assert result is None


def test_evaluation_in_another_precision_is_close() -> None:
    model = plain(10, 1)
    images = Images(torch.randn(64, 1, 8, 8), torch.randint(10, (64,)), 32)
    full = evaluate(model, images, device=CPU)  # type: ignore[arg-type]
    half = evaluate(model, images, device=CPU, precision="bf16")  # type: ignore[arg-type]
    assert full is not None
    assert half is not None
    assert full.loss != half.loss
    assert full.loss == pytest.approx(half.loss, rel=2**-7)


def test_autocast_does_what_precision_says() -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with autocast(CPU, precision):  # type: ignore[arg-type]
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_random_numbers_depend_on_the_batch_only() -> None:
    drawn = []
    for batch in (0, 1, 0):
        torch.rand(batch + 1)
        seed_batch(7, batch, CPU)
        drawn.append(torch.rand(4))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_devices() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


def test_too_little_disk(tmp_path: Path) -> None:
    model = plain(10, 1)
    few, many = RunConfig(keep_checkpoints=1), RunConfig(keep_checkpoints=9, optimizer="adamw", ema_decay=0.9)
    assert bytes_needed(model, few) < bytes_needed(model, many)
    check_disk(tmp_path / "not" / "there" / "yet", 1000)
    with pytest.raises(UserError, match=r"needs about 2,000 MB at .* and 1,000 MB are free: free some space"):
        check_disk(tmp_path, 2000 * 2**20, free=1000 * 2**20)


def test_the_course_survives_as_plain_numbers() -> None:
    state = TrainState(epoch=3, batch=4, step=50, train_flops=2**70, first_loss=2.5)
    state.totals = EpochTotals(loss_sum=3.0, batches=2, images=8, correct=6, stages={"pool": 2})
    again = TrainState.from_state(state.state_dict())
    assert again == state
    assert (again.totals.loss, again.totals.accuracy, again.totals.stage_shares) == (1.5, 75, {"pool": 1.0})


def test_the_nominal_flops_of_an_older_run_stay_unknown() -> None:
    saved = TrainState(train_flops=10, train_flops_nominal=7).state_dict()
    del saved["train_flops_nominal"]
    again = TrainState.from_state(saved)
    again.add_nominal(5)
    assert again.train_flops_nominal is None
