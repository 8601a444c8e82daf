"""Allocation: targets met, bounds, overrides and errors (the greedy oracle is in tests/papers)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clicktrain.errors import UserError
from clicktrain.sparsity.allocation import LayerBudget, allocate, compression_limits, kernel_gains

CHECK = settings(max_examples=150)


def layer(name: str, filters: int, kernels: int, fixed: int | None = None, entries: int = 4) -> LayerBudget:
    return LayerBudget(name, filters, kernels, entries, 9, fixed)


RESNET = [
    layer(str(i), 16 * 2**stage, 16 * 2**stage) for stage in range(3) for i in range(6 * stage, 6 * stage + 6)
]


def nonzero(layers: list[LayerBudget], kept: dict[str, int]) -> int:
    return sum(entry.price * kept[entry.name] for entry in layers)


@pytest.mark.parametrize("compression", [2.5, 4, 8, 10, 20])
@pytest.mark.parametrize("gains", [False, True])
def test_a_network_meets_the_ratio_within_one_percent(compression: float, gains: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    worth = {b.name: kernel_gains(torch.rand(b.filters, b.kernels, generator=generator)) for b in RESNET}
    kept = allocate(RESNET, 432, compression, worth if gains else None)
    total = sum(entry.weights for entry in RESNET) + 432
    assert total / (nonzero(RESNET, kept) + 432) == pytest.approx(compression, rel=0.01)


@st.composite
def networks(draw: st.DrawFn) -> list[LayerBudget]:
    result = []
    for index in range(draw(st.integers(1, 5))):
        kernels = draw(st.integers(1, 20))
        fixed = draw(st.none() | st.integers(1, kernels))
        result.append(
            LayerBudget(str(index), draw(st.integers(1, 20)), kernels, draw(st.integers(1, 9)), 9, fixed)
        )
    return result


@CHECK
@given(networks(), st.integers(0, 100), st.floats(0, 1), st.sampled_from((0.0, 0.3, 1.0)), st.booleans())
def test_what_holds_for_every_network(
    layers: list[LayerBudget], other: int, share: float, floor: float, with_gains: bool
) -> None:
    low, high = compression_limits(layers, other)
    compression = low + share * (high - low)
    gains = None
    if with_gains:
        generator = torch.Generator().manual_seed(0)
        gains = {b.name: kernel_gains(torch.rand(b.filters, b.kernels, generator=generator)) for b in layers}
    kept = allocate(layers, other, compression, gains, floor=floor)
    total = sum(entry.weights for entry in layers) + other
    budget = round(total / compression) - other
    assert set(kept) == {entry.name for entry in layers}
    for entry in layers:
        assert 1 <= kept[entry.name] <= entry.kernels
        if entry.fixed is not None:
            assert kept[entry.name] == entry.fixed
    # Never above the budget (but for the rounding of the limits), and nothing that fits is left unbought.
    left = budget - nonzero(layers, kept)
    assert left >= -1
    for entry in layers:
        if entry.fixed is None and kept[entry.name] < entry.kernels:
            assert entry.price > left


@CHECK
@given(networks(), st.floats(0.05, 0.95), st.sampled_from((0.25, 0.5, 0.9)))
def test_a_floor_is_a_share_of_equal_densities(layers: list[LayerBudget], share: float, floor: float) -> None:
    low, high = compression_limits(layers, 0)
    compression = low + share * (high - low)
    even = allocate(layers, 0, compression)
    worth = {b.name: torch.arange(b.kernels, 0, -1) * 10.0 ** -int(b.name) for b in layers}
    kept = allocate(layers, 0, compression, worth, floor=floor)
    for entry in layers:
        if entry.fixed is None:
            assert kept[entry.name] >= int(floor * even[entry.name])


@pytest.mark.parametrize("compression", [2.5, 4, 8, 10, 16])
def test_without_gains_densities_are_equal_but_for_rounding(compression: float) -> None:
    weights = sum(entry.weights for entry in RESNET)
    density = ((weights + 432) / compression - 432) / weights
    kept = allocate(RESNET, 432, compression)
    for entry in RESNET:
        exact = density * entry.kernels * entry.positions / entry.entries
        # Rounding, and what is left in the end buys one more kernel in the cheapest layers.
        assert -1 < kept[entry.name] - exact < 2


def test_gains_are_what_the_next_kernel_of_every_filter_brings() -> None:
    scores = torch.tensor([[1.0, 5.0, 2.0], [7.0, 0.0, 3.0]])
    assert kernel_gains(scores).tolist() == [12.0, 5.0, 1.0]
    torch.testing.assert_close(kernel_gains(scores, normalize=True), kernel_gains(scores) / 3)
    assert kernel_gains(torch.zeros(2, 2), normalize=True).tolist() == [0.0, 0.0]


def test_normalised_gains_do_not_depend_on_the_scale_of_a_layer() -> None:
    scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        kernel_gains(scores * 1e-12, normalize=True), kernel_gains(scores, normalize=True)
    )


def test_more_important_layers_keep_more() -> None:
    layers = [layer("a", 8, 8), layer("b", 8, 8)]
    gains = {"a": torch.arange(8.0, 0, -1) * 100, "b": torch.arange(8.0, 0, -1)}
    kept = allocate(layers, 0, 4.5, gains)
    assert kept == {"a": 7, "b": 1}


@pytest.mark.parametrize("compression", [1.0, 2.0, 19.0, 1000.0])
def test_unreachable_ratios_name_the_range(compression: float) -> None:
    # 4 of 9 positions: 2.25x at least; one of eight kernels: 18x at most.
    with pytest.raises(UserError, match=r"2\.25x to 18\.00x"):
        allocate([layer("a", 8, 8)], 0, compression)


@pytest.mark.parametrize(("compression", "kept"), [(2.25, 8), (18.0, 1), (18.1, 1), (9.0, 2)])
def test_the_ends_of_the_range_are_reachable(compression: float, kept: int) -> None:
    assert allocate([layer("a", 8, 8)], 0, compression) == {"a": kept}


def test_overrides_count_in_the_range() -> None:
    layers = [layer("a", 8, 8, fixed=8), layer("b", 8, 8)]
    low, high = compression_limits(layers, 0)
    assert low == pytest.approx(2.25)
    assert high == pytest.approx(2 * 8 * 8 * 9 / (8 * 4 * 9))
    assert allocate(layers, 0, 3.0)["a"] == 8


def test_kernels_for_a_density() -> None:
    entry = layer("a", 4, 16)
    assert entry.weights == 4 * 16 * 9
    assert entry.price == 16
    assert entry.kernels_for_density(4 / 9) == 16
    assert entry.kernels_for_density(2 / 9) == 8
    assert entry.kernels_for_density(0.0) == 1
    assert entry.kernels_for_density(1.0) == 16
