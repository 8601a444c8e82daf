"""A latency as ClickTrain's target: measured tables, the search, and what a loop of one's own gets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.graph.prunable import find_prunable
from clicktrain.kernels.native import toolchain
from clicktrain.latency.network_times import Measured, Timed
from clicktrain.latency.sparse_latency import LatencyAim, SparseLatency
from clicktrain.latency.sparse_times import SparseGeometry, SparseTimes, sparse_times
from clicktrain.methods.clicktrain import ClickTrain
from clicktrain.methods.driver.pruner import Pruner
from clicktrain.methods.patterns.axes import ALLOCATIONS, allocation_gains

needs_compiler = pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")
EXAMPLE = torch.zeros(1, 3, 12, 12)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.getbasetemp() / "sparse-times"  # shared by the tests of one process
    monkeypatch.setenv("CLICKTRAIN_LATENCY_CACHE", str(folder))
    return folder


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def attached(model: nn.Module, measure: Any = None, **settings: Any) -> Pruner:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    example = settings.pop("example", EXAMPLE)
    method = ClickTrain(**{"latency_batch": 8, **settings})
    return method.attach(model, optimizer, epochs=2, steps_per_epoch=5, example=example, measure=measure)


def train(pruner: Pruner, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(8, 3, 12, 12, generator=generator)
        y = torch.randint(4, (8,), generator=generator)
        pruner.optimizer.zero_grad()
        loss = F.cross_entropy(pruner.model(x), y)
        loss.backward()
        pruner.observe(loss)
        pruner.optimizer.step()


def finalised(pruner: Pruner) -> dict[str, Any]:
    return next(event for event in pruner.events if event["event"] == "finalised")


@needs_compiler
@pytest.mark.parametrize("timed", ["inference", "step"])
def test_tables_rise_and_are_kept(cache: Path, timed: Timed) -> None:
    conv = nn.Conv2d(16, 16, 3, stride=2, padding=1)
    geometry = SparseGeometry.of(
        conv, (9, 9), entries=4, patterns=5, group=2, batch=4, timed=timed
    )  # fmt: skip
    assert geometry.points() == (1, 2, 4, 8, 12, 16)
    masks = geometry.masks()
    for count, mask in masks.items():
        assert set(mask.flatten(2).sum(2).flatten().tolist()) <= {0, 4}
        assert mask.flatten(1).sum(1).tolist() == [4 * count] * 16
        assert torch.equal(mask[0::2], mask[1::2])
    found = sparse_times([geometry, geometry])[geometry]
    times = [found.at(count) for count in range(1, 17)]
    assert times == sorted(times)
    assert times[0] > 0
    assert max(times) <= found.dense_ms
    assert list(found.sparse_ms) == sorted(found.sparse_ms)
    before = sorted(cache.iterdir())
    assert sparse_times([geometry])[geometry] == found
    assert sorted(cache.iterdir()) == before


def test_noisy_times_become_monotone() -> None:
    found = SparseTimes.of({4: 2.0, 1: 1.0, 2: 3.0}, 2.25)
    assert found.kernels == (1, 2, 4)
    assert list(found.sparse_ms) == sorted(found.sparse_ms)
    assert [found.at(k) for k in (1, 2, 3, 4)] == [1.0, 2.25, 2.25, 2.25]


def test_shares_of_a_layer_add_up_to_one() -> None:
    method = ClickTrain(compression=4)
    targets = method.targets(method.find_prunable(network()))
    scores = {t.layer.name: torch.rand(t.layer.shape[:2]) * (i + 1) for i, t in enumerate(targets)}
    gains = allocation_gains(targets, scores, ALLOCATIONS["share"])
    assert gains is not None
    for target in targets:
        name = target.layer.name
        by_hand = (scores[name].sort(1, descending=True).values / scores[name].sum()).sum(0)
        assert gains[name] == pytest.approx(by_hand.tolist(), rel=1e-5)
        assert float(gains[name].sum()) == pytest.approx(1)


@needs_compiler
def test_predictions_are_the_rest_and_the_layers() -> None:
    model = network()
    method = ClickTrain(compression=4)
    found = find_prunable(model)
    found = replace(found, example=EXAMPLE)
    targets = method.targets(found)
    aim = LatencyAim(None, 1000.0, 8, "inference")
    latency = SparseLatency(found, [target.budget for target in targets], aim, patterns=12)
    images = {"2": (12, 12), "4": (12, 12), "6": (6, 6)}
    tables = {}
    for target in targets:
        geometry = SparseGeometry.of(
            target.layer.module, images[target.layer.name], entries=target.entries, patterns=12, group=1,
            batch=8, timed="inference",
        )  # fmt: skip
        tables[target.layer.name] = sparse_times([geometry])[geometry]
    rest = max(latency.dense_ms - sum(table.dense_ms for table in tables.values()), 0)
    kernels = {"2": 3, "4": 16, "6": 7}
    expected = rest + sum(table.at(kernels[name]) for name, table in tables.items())
    assert latency.predict(kernels) == pytest.approx(expected)


class Slower:
    """A machine on which everything takes three times what weights alone would tell."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, masks: Mapping[str, Tensor], batch: int, timed: Timed) -> Measured:
        kept = sum(int(mask.sum()) for mask in masks.values())
        whole = sum(mask.numel() for mask in masks.values())
        self.seen.append(3.0 * kept / whole)
        return Measured(10.0, 30.0 * kept / whole, 3.0 * kept / whole)


@pytest.mark.filterwarnings("ignore::clicktrain.errors.MissedTarget")  # times vary
@needs_compiler
@pytest.mark.parametrize("allocation", ["share", "relative", "uniform", "erk"])
def test_what_is_measured_decides(allocation: str) -> None:
    measure = Slower()
    pruner = attached(
        network(), measure, latency_target=0.8, latency_batch=64, allocation=allocation, earliest_start=0.2,
        latest_start=0.2,
    )  # fmt: skip
    train(pruner, 10)
    pruner.finish()
    event = finalised(pruner)
    least, *tried = measure.seen
    assert least <= min(tried)
    assert event["attempts"] == len(tried) <= 6
    best = min(tried, key=lambda ratio: abs(torch.tensor(ratio / 0.8).log()))
    assert event["latency_ratio"] == best
    assert event["latency_error"] == pytest.approx(best / 0.8 - 1)
    assert event["latency_met"] == (abs(best / 0.8 - 1) <= 0.05)
    assert event["latency_target_ms"] == pytest.approx(8.0)
    assert event["compression_asked"] is None
    kept = sum(int(mask.sum()) for mask in pruner.masks.values())
    whole = sum(mask.numel() for mask in pruner.masks.values())
    assert 3.0 * kept / whole == pytest.approx(best), "the masks are those of the best attempt"
    for mask in pruner.masks.values():
        assert len(set(mask.flatten(1).sum(1).tolist())) == 1


class Heavy:
    """A network that takes most of its time outside of its layers."""

    def __init__(self, least: float) -> None:
        self.least = least
        self.masks: dict[str, Tensor] = {}

    def __call__(self, masks: Mapping[str, Tensor], batch: int, timed: Timed) -> Measured:
        self.masks = dict(masks)
        return Measured(10.0, 10.0 * self.least, self.least)


@needs_compiler
def test_what_no_kernels_can_save_is_measured_at_once() -> None:
    measure = Heavy(0.7)
    with pytest.raises(UserError, match=r"with one kernel per filter it takes about 7 ms, dense"):
        attached(network(), measure, latency_target=0.6, latency_batch=64)
    assert set(measure.masks) == {"2", "4", "6"}
    for mask in measure.masks.values():
        assert mask.flatten(2).any(2).sum(1).tolist() == [1] * len(mask)
    found = find_prunable(network())
    found = replace(found, example=EXAMPLE)
    method = ClickTrain(latency_target=0.75, latency_batch=64)
    assert method.aim is not None
    budgets = [target.budget for target in method.targets(found)]
    latency = SparseLatency(found, budgets, method.aim, patterns=12, measure=measure)
    assert latency.predict({"2": 1, "4": 1, "6": 1}) == pytest.approx(7.0)


@needs_compiler
def test_without_a_measure_the_prediction_is_believed_and_a_decided_run_goes_on() -> None:
    model = network()
    pruner = attached(
        model, latency_target_ms=1000.0, latency_of="step", earliest_start=0.2, latest_start=0.2
    )
    assert "1000 ms" in str(pruner.plan())
    train(pruner, 6)
    event = finalised(pruner)
    assert event["measured_ms"] is None
    assert event["latency_met"] is None
    assert event["predicted_ms"] <= 1000.0
    assert [layer["kernels_per_filter"] for layer in event["layers"]] == [16, 16, 32], "there is time for all"
    assert pruner.frozen
    other = network()
    again = attached(other, latency_target_ms=1000.0, latency_of="step", earliest_start=0.2, latest_start=0.2)
    again.load_state_dict(pruner.state_dict())
    other.load_state_dict(model.state_dict())
    train(pruner, 3)
    train(again, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(mask, again.masks[name]) for name, mask in pruner.masks.items())
    assert "reached" in str(again.plan())


@pytest.mark.filterwarnings("ignore::clicktrain.errors.MissedTarget")  # tiny layers
@needs_compiler
def test_epi_counts_the_kernels_that_the_time_allows() -> None:
    pruner = attached(network(), latency_target_ms=1000.0, trigger="epi", latest_start=0.6)
    train(pruner, 10)
    pruner.finish()
    assert any(event["event"] == "epi" for event in pruner.events)
    assert finalised(pruner)["predicted_ms"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latency_target": 0.5, "latency_target_ms": 3.0}, "give one"),
        ({"latency_target": 1.5}, "between 0 and 1"),
        ({"latency_target_ms": 0.0}, "above 0"),
        ({"latency_target": 0.5, "latency_batch": 0}, "at least 1"),
        ({"latency_target": 0.5, "latency_of": "epoch"}, "latency_of must be one of inference, step"),
    ],
)
def test_mistakes_in_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClickTrain(**settings)


@needs_compiler
def test_what_cannot_be_done_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="give attach an example"):
        attached(network(), latency_target=0.5, example=None)
    with pytest.raises(UserError, match="cannot be met by this network"):
        attached(network(), latency_target_ms=1e-6)
    with pytest.raises(UserError, match="the network is on meta"):
        attached(network().to("meta"), latency_target=0.5)


@needs_compiler
@pytest.mark.filterwarnings("ignore::clicktrain.errors.MissedTarget")
def test_a_layer_that_has_no_sparse_operator_counts_as_dense() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(2), nn.Conv1d(8, 8, 3),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    pruner = attached(model, latency_target_ms=1000.0, earliest_start=0.2, latest_start=0.2)
    train(pruner, 10)
    pruner.finish()
    assert {layer["name"] for layer in finalised(pruner)["layers"]} == {"1", "3"}


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clicktrain.latency.sparse_latency.toolchain", lambda: None)
    with pytest.raises(UserError, match="there is no C compiler: give a compression"):
        attached(network(), latency_target=0.5)
