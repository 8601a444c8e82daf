"""Allocation by time against plain loops, and against trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clicktrain.latency.search import allocate_within, least_compression_within
from clicktrain.sparsity.allocation import LayerBudget, allocate

Curves = dict[str, list[float]]


@st.composite
def problems(draw: st.DrawFn, most: int = 6) -> tuple[list[LayerBudget], Curves, Curves, float]:
    """Layers with rising times (ties, and flat where the dense operator takes over) and falling gains."""
    layers, times, gains = [], {}, {}
    for index in range(draw(st.integers(1, 3))):
        kernels = draw(st.integers(1, most))
        name = f"layer{index}"
        layers.append(LayerBudget(name, 4, kernels, 4, 9))
        steps = draw(st.lists(st.integers(0, 4), min_size=kernels, max_size=kernels))
        dense = draw(st.integers(1, 12))
        times[name] = [float(min(total, dense)) for total in itertools.accumulate(steps)]
        worth = draw(st.lists(st.integers(0, 5), min_size=kernels, max_size=kernels))
        gains[name] = [float(one) for one in sorted(worth, reverse=True)]
    return layers, times, gains, float(draw(st.integers(0, 30)))


def literally(
    layers: Sequence[LayerBudget], times: Curves, gains: Curves, budget: float, least: Mapping[str, int]
) -> dict[str, int]:
    """Look at every jump of every layer, take the best that can be paid for, until there is none."""
    kept = {layer.name: least.get(layer.name, 1) for layer in layers}
    while True:
        spent = sum(times[name][count - 1] for name, count in kept.items())
        best: tuple[float, str, int] | None = None
        for layer in layers:
            now = kept[layer.name]
            for count in range(now + 1, layer.kernels + 1):
                cost = times[layer.name][count - 1] - times[layer.name][now - 1]
                if cost > max(budget - spent, 0):
                    continue
                rate = sum(gains[layer.name][now:count]) / cost if cost else math.inf
                if best is None or rate > best[0]:
                    best = rate, layer.name, count
        if best is None:
            return kept
        kept[best[1]] = best[2]


@given(problems())
def test_it_is_the_literal_one(problem: tuple[list[LayerBudget], Curves, Curves, float]) -> None:
    layers, times, gains, budget = problem
    least = {layers[0].name: min(2, layers[0].kernels)}
    assert allocate_within(layers, times, gains, budget, least) == literally(*problem, least)


@given(problems(4))
def test_it_is_less_than_a_jump_from_the_best(
    problem: tuple[list[LayerBudget], Curves, Curves, float],
) -> None:
    layers, times, gains, budget = problem

    def worth(counts: Sequence[int]) -> float:
        return sum(sum(gains[layer.name][:n]) for layer, n in zip(layers, counts, strict=True))

    def cost(counts: Sequence[int]) -> float:
        return sum(times[layer.name][n - 1] for layer, n in zip(layers, counts, strict=True))

    everything = itertools.product(*(range(1, layer.kernels + 1) for layer in layers))
    best = max((worth(counts) for counts in everything if cost(counts) <= budget), default=None)
    found = list(allocate_within(layers, times, gains, budget).values())
    if best is None:
        return
    assert cost(found) <= budget
    assert worth(found) >= best - max(sum(gains[layer.name][1:]) for layer in layers)


def test_by_hand() -> None:
    layers = [LayerBudget("slow", 4, 4, 4, 9), LayerBudget("fast", 4, 4, 4, 9)]
    times = {"slow": [2.0, 4.0, 6.0, 8.0], "fast": [1.0, 2.0, 2.5, 2.5]}
    gains = {"slow": [4.0, 4.0, 4.0, 4.0], "fast": [4.0, 3.0, 1.0, 1.0]}
    # 3 ms are spent; fast's second kernel brings 3 a ms, its third and fourth 2 for half a ms, slow's 2 a ms.
    assert allocate_within(layers, times, gains, 4.0) == {"slow": 1, "fast": 2}
    assert allocate_within(layers, times, gains, 4.5) == {"slow": 1, "fast": 4}
    assert allocate_within(layers, times, gains, 6.5) == {"slow": 2, "fast": 4}
    assert allocate_within(layers, times, gains, 0.5) == {"slow": 1, "fast": 1}


def test_fixed_layers_and_floors_are_kept() -> None:
    layers = [LayerBudget("a", 4, 4, 4, 9, fixed=3), LayerBudget("b", 4, 4, 4, 9)]
    times = {name: [1.0, 2.0, 3.0, 4.0] for name in "ab"}
    gains = {"a": [9.0] * 4, "b": [1.0] * 4}
    assert allocate_within(layers, times, gains, 100.0) == {"a": 3, "b": 4}
    assert allocate_within(layers, times, gains, 4.0, {"a": 1, "b": 2}) == {"a": 3, "b": 2}


def test_the_least_compression_that_is_fast_enough() -> None:
    layers = [LayerBudget("a", 8, 16, 4, 9), LayerBudget("b", 16, 8, 4, 9)]

    def predict(kept: Mapping[str, int]) -> float:
        return 0.5 + 2.0 * kept["a"] + 1.0 * kept["b"]

    ratio, kept = least_compression_within(layers, 100, predict, 17.0)
    assert kept == allocate(layers, 100, ratio)
    assert predict(kept) <= 17.0 < predict(allocate(layers, 100, ratio * 0.97))
    assert least_compression_within(layers, 100, predict, 1000.0)[1] == {"a": 16, "b": 8}
    assert least_compression_within(layers, 100, predict, 0.0)[1] == {"a": 1, "b": 1}


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.3, 0.6])
def test_a_budget_that_is_exactly_spent_is_spent(budget: float) -> None:
    layers = [LayerBudget("a", 1, 6, 1, 9)]
    times = {"a": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}
    kept = allocate_within(layers, times, {"a": [1.0] * 6}, budget + 1e-12)["a"]
    assert times["a"][kept - 1] == pytest.approx(budget)
