"""Batches that grow as channels go: how far, with what learning rate, and the same after an interruption."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import DENSE, Killed, Messages, assert_same_run, kill, resume, run
from torch import nn
from torch.optim import SGD

from clicktrain.accounting import TrainingMemory
from clicktrain.accounting.memory import bytes_in_words, bytes_of
from clicktrain.data import Augment, make_loader, open_data
from clicktrain.errors import UserError
from clicktrain.train import RunConfig, RunFolder, StepProgress, TrainingInterrupted
from clicktrain.train.minibatch import grown_batch, rate_factor
from clicktrain.train.optim import BatchSizes, learning_rate_factor, make_scheduler, refresh_

IMAGES = len(open_data("digits").train)
GROWING: dict[str, Any] = {
    "model": "tiny_networks:tiny",
    "method": "prunetrain",
    "epochs": 5,
    "threads": 1,
    "batch_size": 96,
    "interval": 1,
    "penalty_ratio": 0.4,
    "floor": 0.0,
    "threshold": 0.005,
    "dynamic_batch": True,
    "batch_limit": 320,
}


class AtStep(Messages):
    """Does something when an optimizer step of the run, counted from 1, is done."""

    def __init__(self, number: int, action: Callable[[], None]) -> None:
        super().__init__()
        self.number, self.what = number, action
        self.epochs: list[int] = []

    def step(self, info: StepProgress) -> None:
        self.epochs.append(info.epoch)
        if info.step == self.number:
            self.what()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    run(path, GROWING)
    return path


def test_the_batch_grows_within_the_first_ones_memory(whole: Path) -> None:
    metrics = RunFolder(whole).read_metrics()
    events = [e for e in RunFolder(whole).read_events() if e["event"] == "batch_resized"]
    sizes = [line["batch_size"] for line in metrics]
    assert sizes[0] == 96
    assert sizes == sorted(sizes)
    assert [event["step"] for event in events] == [15, 26]  # the tests below are interrupted around them
    for event in events:
        epoch = event["epoch"]
        assert sizes[epoch - 1] < sizes[epoch] == event["batch_size"] <= 320
        assert (event["batch_size"] - 96) % 32 == 0
        assert event["learning_rate_factor"] == event["batch_size"] / 96
        assert event["memory_budget"] == metrics[0]["memory_bytes"]
        assert event["memory_estimated"] == metrics[epoch]["memory_bytes"] <= event["memory_budget"]
        line = metrics[epoch]
        one_more = line["memory_bytes"] * (event["batch_size"] + 32) / event["batch_size"]
        assert event["batch_size"] + 32 > 320 or one_more > 0.9 * event["memory_budget"]


def test_every_epochs_line_tells_what_it_trained_with(whole: Path) -> None:
    metrics = RunFolder(whole).read_metrics()
    events = {round(e["epoch"]): e for e in RunFolder(whole).read_events() if e["event"] == "reconfigured"}
    for line in metrics:
        assert line["gradient_bytes"] == 4 * line["parameters"]
        assert line["gradient_bytes_epoch"] == line["gradient_bytes"] * (IMAGES // line["batch_size"])
    flops = [0, *(line["train_flops"] for line in metrics)]
    for before, after, line in zip(flops, flops[1:], metrics, strict=False):
        seen = IMAGES // line["batch_size"] * line["batch_size"]
        assert after - before == seen * line["train_flops_per_image"]
    first = min(epoch for epoch, e in events.items() if e["channels_after"] < e["channels_before"])
    assert metrics[first - 1]["parameters"] == metrics[0]["parameters"] > metrics[first]["parameters"]
    # Four batch norms' worth of features: read, written; read twice and written on the way back.
    assert metrics[0]["batch_norm_bytes"] == 5 * 4 * 96 * (8 * 64 + 16 * 64 + 16 * 16)


@pytest.mark.parametrize("step", [8, 17, 28, 40])
def test_killed_before_and_after_a_resize(tmp_path: Path, whole: Path, step: int) -> None:
    with pytest.raises(Killed):
        run(tmp_path / "run", GROWING, AtStep(step, kill))
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("step", [14, 15, 26])
def test_stopped_in_the_middle_of_an_epoch_and_at_its_last_step(
    tmp_path: Path, whole: Path, step: int
) -> None:
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "run", GROWING, AtStep(step, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_no_resize_changes_nothing(tmp_path: Path) -> None:
    """A limit of the first size: the same run as without."""
    settings = {**GROWING, "epochs": 2, "batch_limit": 96}
    run(tmp_path / "fixed", {**settings, "dynamic_batch": False, "batch_limit": None})
    run(tmp_path / "limited", settings)
    assert_same_run(tmp_path / "fixed", tmp_path / "limited")


def test_a_budget_that_is_given(tmp_path: Path) -> None:
    settings = {**GROWING, "epochs": 2, "batch_limit": None, "memory_budget": "1GiB", "batch_lr": "sqrt"}
    run(tmp_path / "run", settings)
    line = RunFolder(tmp_path / "run").read_metrics()[1]
    assert line["batch_size"] == 96 + (IMAGES - 96) // 32 * 32  # all images, in steps of 32
    event = next(e for e in RunFolder(tmp_path / "run").read_events() if e["event"] == "batch_resized")
    assert event["memory_budget"] == 2**30
    assert event["learning_rate_factor"] == math.sqrt(line["batch_size"] / 96)
    with pytest.raises(UserError, match=r"memory_budget is 100KiB but an iteration at batch_size=96 takes"):
        run(tmp_path / "other", {**settings, "memory_budget": "100KiB"})
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_budget": "1GiB"}, "memory_budget is set but dynamic_batch is false"),
        ({"dynamic_batch": True, "memory_budget": "much"}, "memory_budget: 'much' is no amount of memory"),
        ({"dynamic_batch": True, "memory_budget": "0GB"}, "memory_budget"),
        ({"dynamic_batch": True, "batch_limit": 64}, "batch_limit is 64: must be at least batch_size"),
        ({"batch_lr": "cubic"}, "batch_lr is 'cubic': use one of linear, sqrt, none"),
        ({"batch_granularity": 0}, "batch_granularity is 0"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RunConfig(**settings)


def test_a_method_that_removes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="method dense removes no channels"):
        run(tmp_path / "run", {**DENSE, "dynamic_batch": True})


# ---------------------------------------------------------------- parts


def test_how_far_a_batch_grows() -> None:
    memory = TrainingMemory(8, 0, 2, 50, 30, 20)  # 100 + 10 per image
    assert grown_batch(memory, 64, 100 + 10 * 128, 32, 10_000) == 128  # just fits
    assert grown_batch(memory, 64, 100 + 10 * 128 - 1, 32, 10_000) == 96
    assert grown_batch(memory, 64, 10**9, 32, 200) == 192
    assert grown_batch(memory, 64, 0, 32, 10_000) == 64  # never shrinks
    half = memory.with_calibration(0.5)
    assert grown_batch(half, 64, 50 + 5 * 128, 32, 10_000) == 128
    assert [rate_factor(256, 64, rule) for rule in ("linear", "sqrt", "none")] == [4.0, 2.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "onecycle", "step", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 1.0])
def test_without_a_resize_the_learning_rates_are_the_same_bit_for_bit(schedule: Any, warmup: float) -> None:
    config = RunConfig(epochs=7, schedule=schedule, warmup_epochs=warmup, learning_rate=0.3)
    rates = []
    for sizes in (None, BatchSizes(32, 37, 2)):
        optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler = make_scheduler(optimizer, config, 7 * 19, sizes)
        rates.append([])
        for _ in range(7 * 19):
            rates[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert rates[0] == rates[1]


def test_after_a_resize_the_schedule_goes_on_where_the_epoch_is() -> None:
    config = RunConfig(epochs=8, schedule="cosine", learning_rate=0.4)
    sizes = BatchSizes(100, 40, 1)
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = make_scheduler(optimizer, config, 8 * 40, sizes)
    found: dict[float, float] = {}
    for epoch in range(8):
        if epoch in (3, 5):
            batches = {3: 20, 5: 8}[epoch]
            sizes.resize(epoch, 4000 // batches, batches, 40 / batches)
            refresh_(scheduler)
        for step in range(sizes.now.steps):
            found[epoch + step / sizes.now.steps] = optimizer.param_groups[0]["lr"]
            assert scheduler.get_last_lr() == [optimizer.param_groups[0]["lr"]]
            optimizer.step()
            scheduler.step()
    factor = learning_rate_factor(config, 8 * 40)
    assert len(found) == 3 * 40 + 2 * 20 + 3 * 8
    for position, rate in found.items():
        ratio = 1 if position < 3 else 2 if position < 5 else 5
        assert rate == pytest.approx(0.4 * ratio * factor(position * 40))


def test_where_a_batch_is_in_the_run() -> None:
    sizes = BatchSizes(10, 7, 2)  # 4 steps
    numbers = [sizes.batch_number(epoch, batch) for epoch in range(2) for batch in range(7)]
    sizes.resize(2, 20, 3, 2.0)  # 2 steps
    numbers += [sizes.batch_number(epoch, batch) for epoch in (2, 3) for batch in range(3)]
    assert numbers == list(range(20))
    assert [sizes.schedule_step(step) for step in range(12)] == [*range(8), 8, 10, 12, 14]
    other = BatchSizes(10, 7, 2)
    other.load_state(sizes.state_dict())
    assert other.state_dict() == sizes.state_dict()
    with pytest.raises(ValueError, match="has its batch size already"):
        sizes.resize(2, 30, 2, 3.0)


def test_a_loader_of_other_batches_has_the_same_order() -> None:
    data = open_data("digits")
    loader = make_loader(
        data, "train", batch_size=32, device=torch.device("cpu"), seed=1, augment=Augment(), drop_last=True
    )
    other = loader.with_batch_size(64)
    assert len(other) == len(data.train) // 64
    small, large = list(loader.epoch(3)), list(other.epoch(3))
    assert torch.equal(torch.cat([b.y for b in small])[: 64 * len(large)], torch.cat([b.y for b in large]))
    assert torch.equal(torch.cat([small[0].x, small[1].x]), large[0].x)
    with pytest.raises(ValueError, match="make no batch of"):
        loader.with_batch_size(len(data.train) + 1)


@pytest.mark.parametrize(
    ("words", "count"),
    [("4GiB", 4 * 2**30), ("1.5 kib", 1536), ("500MB", 500 * 10**6), ("123", 123), ("7B", 7)],
)
def test_amounts_of_memory(words: str, count: int) -> None:
    assert bytes_of(words) == count


def test_amounts_in_words() -> None:
    assert [bytes_in_words(n) for n in (12, 2048, 3 * 2**29)] == ["12 bytes", "2 KiB", "1.5 GiB"]
