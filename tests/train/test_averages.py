"""Lookahead, averages after the cut and newly measured norms, against slow references."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import (
    BATCHES,
    DENSE,
    FIVE_STAGES,
    At,
    Silent,
    assert_same_run,
    resume,
    run,
    weights,
)
from tiny_networks import tiny
from torch import nn

from clicktrain.errors import UserError
from clicktrain.train import RunConfig, RunFolder, TrainingInterrupted, from_dict
from clicktrain.train.averages import SlowWeights, begin_again_, make_average
from clicktrain.train.norms import measure_norms_, norms_kept, norms_of
from clicktrain.train.prepare import prepare


def shaken_(model: nn.Module) -> None:
    """Stands for five optimizer steps."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.1)


def test_lookahead_step_by_step() -> None:
    """Zhang et al., Algorithm 1, on every tensor by itself: slow += (1 - keep) (fast - slow); fast = slow."""
    torch.manual_seed(0)
    model = tiny(4, 1)
    average = SlowWeights(model)
    slow = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(1, 6):
        shaken_(model)
        model[1].num_batches_tracked.fill_(number)
        keep = 0.95**5 * (number / 5) ** 3
        for name, fast in model.state_dict().items():
            slow[name] = (
                slow[name] + (1 - keep) * (fast - slow[name]) if fast.is_floating_point() else fast.clone()
            )
        average.exchange_(model, number / 5, {})
        for name, value in slow.items():
            assert torch.allclose(average.module.state_dict()[name], value, atol=1e-6), name
            assert torch.equal(average.module.state_dict()[name], model.state_dict()[name]), name


def test_lookahead_drops_the_slow_values_of_masked_weights() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    average = SlowWeights(model)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    with torch.no_grad():
        model[0].weight.masked_fill_(~mask, 0.0)
    average.exchange_(model, 1.0, {"0": mask})
    assert (model[0].weight[~mask] == 0).all()
    assert (average.module[0].weight[~mask] == 0).all()  # type: ignore[operator, index]


@pytest.mark.parametrize("make", [lambda m: make_average(m, 0.9), SlowWeights])
def test_an_average_begins_again(make: Any) -> None:
    model = tiny(4, 1)
    average = make(model)
    for _ in range(3):
        shaken_(model)
        average.update_parameters(model)
    shaken_(model)
    begin_again_(average, model)
    for name, value in model.state_dict().items():
        assert torch.equal(average.module.state_dict()[name], value)
    assert int(average.n_averaged) == 1


def test_norms_are_the_means_over_the_batches() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=0.3), nn.ReLU(), nn.BatchNorm2d(3))
    model.eval()
    batches = [torch.randn(size, 2, 6, 6) + size for size in (4, 6, 5)]
    x = [model[0](batch).detach() for batch in batches]
    mean = torch.stack([y.mean(dim=(0, 2, 3)) for y in x]).mean(dim=0)
    variance = torch.stack([y.var(dim=(0, 2, 3), unbiased=True) for y in x]).mean(dim=0)
    assert measure_norms_(model, batches) == 15
    assert torch.allclose(model[1].running_mean, mean, atol=1e-5)
    assert torch.allclose(model[1].running_var, variance, atol=1e-5)
    assert (model[1].momentum, model[3].momentum, model.training) == (0.3, 0.1, False)


def test_norms_are_put_back() -> None:
    model = tiny(4, 1)
    before = copy.deepcopy(model.state_dict())
    with norms_kept(model):
        measure_norms_(model, [torch.randn(4, 1, 8, 8)])
        assert not torch.equal(before["1.running_mean"], model.state_dict()["1.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_norms_without_statistics_and_in_evaluation_stay() -> None:
    fixed = nn.BatchNorm2d(2)
    model = nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False), fixed)
    fixed.train = lambda mode=True: nn.BatchNorm2d.train(fixed, False)  # type: ignore[method-assign]
    assert norms_of(model) == [fixed]
    measure_norms_(model, [torch.randn(4, 2, 3, 3)])
    assert fixed.running_mean is not None
    assert not fixed.running_mean.any()


def test_refused() -> None:
    with pytest.raises(UserError, match="lookahead and ema_decay are both set"):
        RunConfig(lookahead=True, ema_decay=0.9)
    with pytest.raises(UserError, match="recalibrate_norms is -1: must be at least 0"):
        RunConfig(recalibrate_norms=-1)


def test_no_norms_to_measure(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="recalibrate_norms is 3 but model tiny_networks:plain has no batch"):
        run(tmp_path / "run", {**DENSE, "model": "tiny_networks:plain", "recalibrate_norms": 3})


EXTRAS: dict[str, dict[str, Any]] = {
    "lookahead": {"lookahead": True, "recalibrate_norms": 3, "second_cycle": 0.5},
    "ema": {"ema_decay": 0.95, "recalibrate_norms": 2, "accumulate": 2, "mixup": 0.2},
    "masked-adamw": {"lookahead": True, "packed": False, "optimizer": "adamw", "learning_rate": 3e-3},
    "moving": {"method": "rigl", "lookahead": True, "recalibrate_norms": 13, "granularity": "kernel"},
    "accelerated": {"recalibrate_norms": 2, "operators": "sparse"},
}


@pytest.mark.long
@pytest.mark.parametrize("name", EXTRAS)
def test_resumed(tmp_path: Path, name: str) -> None:
    settings = {**(FIVE_STAGES if name != "moving" else {**DENSE, "epochs": 6}), **EXTRAS[name]}
    run(tmp_path / "whole", settings)
    with pytest.raises(TrainingInterrupted):  # right after the cut
        run(tmp_path / "run", settings, At(50, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_how_often_a_run_is_evaluated_changes_nothing(tmp_path: Path) -> None:
    settings = {**FIVE_STAGES, "ema_decay": 0.9, "recalibrate_norms": 2}
    run(tmp_path / "often", settings)
    run(tmp_path / "once", {**settings, "evaluate_every": 6})
    often, once = weights(tmp_path / "often"), weights(tmp_path / "once")
    assert all(torch.equal(often[name], once[name]) for name in often)


def test_measured_norms_are_recorded_and_counted(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain", FIVE_STAGES)
    summary = run(tmp_path / "run", {**FIVE_STAGES, "recalibrate_norms": 4})
    (event,) = [e for e in RunFolder(tmp_path / "run").read_events() if e["event"] == "norms_recalibrated"]
    assert (event["batches"], event["images"]) == (4, 4 * 128)
    assert event["train_flops"] == 512 * summary["inference_flops"]
    assert summary["train_flops"] == plain["train_flops"] + event["train_flops"]


def test_the_averages_norms_are_measured_at_the_end(tmp_path: Path) -> None:
    """What is saved has the statistics of its own weights, over the first batches after the run."""
    settings = {**DENSE, "epochs": 1, "lookahead": True, "recalibrate_norms": 2, "seed": 3}
    run(tmp_path / "run", settings)
    (event,) = [e for e in RunFolder(tmp_path / "run").read_events() if e["event"] == "norms_recalibrated"]
    assert event["epoch"] == 1
    prepared = prepare(*from_dict(settings))
    saved = weights(tmp_path / "run")
    first = nn.Conv2d(1, 8, 3, padding=1, bias=False)
    first.load_state_dict({"weight": saved["0.weight"]})
    loader = iter(prepared.train_loader.epoch(1))
    x = [first(next(loader).x).detach() for _ in range(2)]
    mean = torch.stack([y.mean(dim=(0, 2, 3)) for y in x]).mean(dim=0)
    assert torch.allclose(saved["1.running_mean"], mean, atol=1e-5)


def test_lookahead_in_a_run(tmp_path: Path) -> None:
    """What is saved are the slow weights of the last exchange: batch 10 of 11; the network has moved on."""
    slow: dict[str, torch.Tensor] = {}

    class Watch(Silent):
        def start(self, config: Any, method: Any, prepared: Any) -> None:
            self.model = prepared.model

        def step(self, info: Any) -> None:
            if info.batch == 10:
                slow.update({n: v.clone() for n, v in self.model.state_dict().items()})

    run(tmp_path / "run", {**DENSE, "epochs": 1, "lookahead": True}, Watch())
    saved = weights(tmp_path / "run")
    assert BATCHES == 11
    assert all(torch.equal(saved[name], slow[name]) for name in saved)
