"""What a structure costs: channel counts, predictions, penalties, and the search for a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clicktrain.graph.prunable import find_prunable
from clicktrain.latency.channels import fewest_pruned
from clicktrain.latency.network_times import bare_copy, compare_ms
from clicktrain.latency.search import LatencySearch
from clicktrain.methods.channels.budget import ChannelBudget
from clicktrain.methods.channels.selection import ChannelSelection, LatencyCalibration
from clicktrain.models import create_model
from clicktrain.sparsity.channel_importance import masks_after
from clicktrain.surgery import apply_surgery_, plan_from_keep


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp() / "layer-times"  # shared by the tests of one process
    monkeypatch.setenv("CLICKTRAIN_LATENCY_CACHE", str(folder))


def selection(name: str, dense_ms: float = 1000.0, **budget: float | None) -> ChannelSelection:
    model = create_model(name, num_classes=4, in_channels=3, width=0.25, stem="cifar")
    prunable = replace(find_prunable(model, include=("*",), linear=True), example=torch.zeros(1, 3, 8, 8))
    asked = ChannelBudget(0.3, 0.5, None, 2, 1.0, 1, 1)
    return ChannelSelection.of(prunable, replace(asked, **budget), (), LatencyCalibration(dense_ms))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v1", "vgg11"])
def test_channel_counts_are_those_of_the_smaller_network(name: str) -> None:
    chosen = selection(name)
    latency, model = chosen.latency, chosen.prunable.model
    assert latency is not None
    assert model is not None
    generator = torch.Generator().manual_seed(0)
    masks = {n: torch.rand(size, generator=generator) < 0.6 for n, size in chosen.sizes.items()}
    for mask in masks.values():
        mask[0] = True
    plan = plan_from_keep(model, torch.zeros(1, 3, 8, 8), masks)
    small = bare_copy(model)
    apply_surgery_(plan, small)
    layers = [m for m in small.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    real = sorted(
        (m.in_channels, m.out_channels) if isinstance(m, nn.Conv2d) else (m.in_features, m.out_features)
        for m in layers
    )
    kept = {n: int(mask.sum()) for n, mask in masks.items()}
    assert sorted((i.at(kept), o.at(kept)) for _, i, o in latency._times) == real
    elements = 0

    def count(module: nn.Module, args: object, output: Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    for module in small.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.AdaptiveAvgPool2d)):
            module.register_forward_hook(count)
    small.eval()(torch.zeros(1, 3, 8, 8))
    if name != "resnet8":  # its additions and pooling are no modules
        assert latency._elements.at(kept) == elements


def test_predictions_fall_with_every_neuron_from_what_was_measured() -> None:
    latency = selection("resnet8").latency
    assert latency is not None
    kept = dict(latency._sizes)
    assert latency.predict(kept) == pytest.approx(1000.0)
    saved = latency.saved_by_a_neuron(kept)
    assert min(saved.values()) >= 0
    assert max(saved.values()) > 0
    before = latency.predict(kept)
    for _ in range(3):
        for name in kept:
            kept[name] -= 1
            now = latency.predict(kept)
            assert now < before, "the rest of the network shrinks with the elements"
            before = now


def test_importance_per_millisecond_by_hand() -> None:
    latency = selection("resnet8").latency
    assert latency is not None
    kept = dict(latency._sizes)
    saved = latency.saved_by_a_neuron(kept)
    mean = sum(saved.values()) / len(saved)
    scores = {name: torch.ones(size) for name, size in kept.items()}
    ranked = latency.penalized(scores, kept, 1.0)
    for name, score in ranked.items():
        assert score[0] == pytest.approx(1 / (0.05 + saved[name] / mean))
    expensive = max(saved, key=lambda name: saved[name])
    assert all(ranked[expensive][0] <= score[0] for score in ranked.values())
    assert all(torch.equal(latency.penalized(scores, kept, 0.0)[n], scores[n]) for n in scores)


@given(aim=st.floats(0, 25), sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_no_neuron_more_than_the_aim_needs(aim: float, sizes: list[int]) -> None:
    named = {str(i): size for i, size in enumerate(sizes)}
    order = [(name, i) for name, size in named.items() for i in range(size - 1)]

    def masks(first: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
        return masks_after(first, named)

    def predict(kept: dict[str, int]) -> float:
        return float(sum(kept.values()))

    prunable = fewest_pruned(order, masks, predict, aim)  # type: ignore[arg-type]
    left = sum(int(mask.sum()) for mask in prunable.values())
    possible = [sum(sizes) - n for n in range(len(order) + 1)]
    assert left == max((n for n in possible if n <= aim), default=min(possible))


def test_measuring_leaves_the_network_alone() -> None:
    chosen = selection("resnet8")
    model = chosen.prunable.model
    assert model is not None
    calls = []
    handle = model.register_forward_pre_hook(lambda module, args: calls.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = chosen.plan(chosen.choose({n: torch.rand(s) for n, s in chosen.sizes.items()}, None, 1, 1))
    assert plan
    times = compare_ms(model, plan, torch.zeros(1, 3, 8, 8), 2)
    assert min(times.dense_ms, times.pruned_ms) > 0
    assert 0 < times.ratio < 3
    assert calls == []
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    handle.remove()
    model(torch.zeros(1, 3, 8, 8))
    assert calls == []


def test_steps_before_the_last_prune_no_more_than_predicted() -> None:
    chosen = selection("resnet8", dense_ms=50.0)
    scores = {n: torch.rand(s) for n, s in chosen.sizes.items()}
    before_last, reserve = chosen.choose(scores, None, 2, 3), chosen.within(1.2 * 25.0, scores, None)
    assert all(torch.equal(before_last[n], reserve[n]) for n in reserve), "something is left to give"
    plain = chosen.choose(scores, None, 1, 3)
    chosen.calibration.correction = 1.6
    careful = chosen.choose(scores, None, 1, 3)
    assert all(torch.equal(plain[name], careful[name]) for name in plain)
    last = chosen.choose(scores, careful, 3, 3)
    assert sum(int(m.sum()) for m in last.values()) < sum(int(m.sum()) for m in careful.values())
    chosen.calibration.correction = 0.8
    fewer = chosen.choose(scores, None, 1, 3)
    assert sum(int(m.sum()) for m in fewer.values()) > sum(int(m.sum()) for m in plain.values())


@pytest.mark.parametrize("jump", [0.0, 0.3])
def test_the_search_ends_within_the_target_although_one_layer_is_a_staircase(jump: float) -> None:
    chosen = selection("resnet8", dense_ms=50.0)
    assert chosen.latency is not None
    latency = chosen.latency
    scores = {n: torch.rand(s) for n, s in chosen.sizes.items()}
    stage = next(iter(chosen.sizes))
    start = chosen.within(0.6 * 50.0, scores, None)
    edge = int(start[stage].sum())

    def true_ms(masks: dict[str, Tensor]) -> float:
        """One neuron more than the start has costs a lot; all predictions are a tenth too low."""
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        return 1.1 * latency.predict(kept) * (1 + jump * (kept[stage] > edge))

    target = true_ms(start) * (1.1 if jump else 0.9)
    search = LatencySearch(latency.predict, lambda aim, fixed: chosen.within(aim, scores, None, fixed=fixed))
    masks: dict[str, Tensor] | None = start
    reached = []
    while masks is not None and len(reached) < 10:
        reached.append(true_ms(masks) / target)
        if abs(reached[-1] - 1) <= 0.025:
            break
        masks = search.after(masks, reached[-1])
    assert min(abs(one - 1) for one in reached) <= 0.05, reached
