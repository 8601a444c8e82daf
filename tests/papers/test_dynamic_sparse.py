"""Dropping and growing, against the papers' updates in plain loops, on scores with ties."""

from __future__ import annotations

import math
import random

import dynamic_reference as reference
import pytest
import torch
from torch import Tensor

from clicktrain.sparsity.distributions import erdos_renyi_densities
from clicktrain.sparsity.living_filters import random_units
from clicktrain.sparsity.regrowth import (
    Update,
    adapted_threshold,
    below_threshold,
    grow_random,
    grow_steepest,
    growth_shares,
    keep_largest,
    largest,
    random_numbers,
)
from clicktrain.sparsity.schedules import cosine
from clicktrain.sparsity.units import UNITS

SHAPES = [(5, 7, 3, 3), (4, 6, 1, 1), (3, 2, 5, 3), (6, 9), (1, 2, 3, 3)]


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    """Eighths of small whole numbers: exact in every sum, with many ties and zeros."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).float() / 8


def view(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[F, C, R, S] of a weight of this shape."""
    return shape if len(shape) == 4 else (*shape, 1, 1)


def unit_shape(shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    return UNITS[kind].shape(view(shape))


def unit_scores(tensor: Tensor, kind: str) -> Tensor:
    """Mean magnitudes of units."""
    return UNITS[kind].scores(tensor.abs().view(view(tuple(tensor.shape))))


def weights_of(units: Tensor, shape: tuple[int, ...], kind: str) -> Tensor:
    return UNITS[kind].weights(units, view(shape)).view(shape)


def some_units(shape: tuple[int, ...], kind: str, density: float, seed: int, layer: int) -> Tensor:
    """A share of the units at random."""
    units = unit_shape(shape, kind)
    return random_units(units, max(round(density * math.prod(units)), 1), seed, layer)


def as_units(tensor: Tensor, kind: str) -> list[list[float]]:
    if kind == "kernel" and tensor.dim() == 4:
        return tensor.flatten(2).flatten(0, 1).tolist()  # type: ignore[no-any-return]
    return tensor.reshape(-1, 1).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["weight", "kernel"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("step", [0, 30, 70, 99])
def test_an_update_of_rigl(shape: tuple[int, ...], kind: str, step: int) -> None:
    weight, grad = draw(shape, 1 + step), draw(shape, 2 + step)
    units = some_units(shape, kind, 0.4, 3, step)
    weight *= weights_of(units, shape, kind)
    expected = reference.rigl_update(
        as_units(weight, kind), as_units(grad, kind), units.flatten().tolist(), step, 100, 0.5
    )
    count = int(units.sum())
    dropped = min(math.floor(0.5 * cosine(step / 100) * count), count - 1)
    kept = keep_largest(unit_scores(weight, kind), units, count - dropped)
    grown = grow_steepest(kept, dropped, unit_scores(grad, kind))
    assert grown.flatten().tolist() == expected
    assert int(grown.sum()) == count


@pytest.mark.parametrize("kind", ["weight", "kernel"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [0.0, 1 / 8, 0.2, 2 / 8, 9.0])
def test_pruning_by_threshold(shape: tuple[int, ...], kind: str, threshold: float) -> None:
    weight = draw(shape, 5)
    units = some_units(shape, kind, 0.5, 1, 2)
    weight *= weights_of(units, shape, kind)
    expected = reference.dsr_prune(as_units(weight, kind), units.flatten().tolist(), threshold)
    scores = unit_scores(weight, kind)
    size = weight.numel() // units.numel()
    now = Update({"a": units}, {"a": scores}, {}, {"a": shape}, {"a": size}, memory={"threshold": threshold})
    assert below_threshold(now, 0.1)["a"].flatten().tolist() == expected


def test_growth_shares_against_loops() -> None:
    chance = random.Random(0)
    for _ in range(300):
        layers = chance.randint(1, 6)
        survivors = [chance.randint(1, 40) for _ in range(layers)]
        free = [chance.choice([0, 3, 10, 100]) for _ in range(layers)]
        total = chance.randint(0, 120)
        grown = growth_shares(total, survivors, free, [1] * layers)
        assert grown == reference.dsr_grow_counts(total, survivors, free)
        assert sum(grown) == min(total, sum(free))
        assert all(0 <= g <= f for g, f in zip(grown, free, strict=True))
    assert growth_shares(10, [3, 1], [100, 100], [1, 1]) == [8, 2]  # 7.5 and 2.5: the first of equals
    assert growth_shares(40, [3, 1], [2, 100], [1, 1]) == [2, 38]  # full: the other takes it
    assert growth_shares(-3, [3, 1], [2, 100], [1, 1]) == [0, 0]


def test_growth_in_units_of_several_weights() -> None:
    chance = random.Random(1)
    for _ in range(300):
        layers = chance.randint(1, 5)
        sizes = [chance.choice([1, 9, 25]) for _ in range(layers)]
        survivors = [size * chance.randint(1, 30) for size in sizes]
        free = [chance.choice([0, 2, 50]) for _ in range(layers)]
        total = chance.randint(0, 500)
        grown = growth_shares(total, survivors, free, sizes)
        left = total - sum(g * size for g, size in zip(grown, sizes, strict=True))
        assert left >= 0
        assert all(0 <= g <= f for g, f in zip(grown, free, strict=True))
        able = [size for g, f, size in zip(grown, free, sizes, strict=True) if g < f]
        assert not able or left < min(able)  # no further unit fits


def test_the_threshold_adapts() -> None:
    for pruned in (0, 89, 90, 91, 100, 110, 111, 500):
        for threshold in (1e-3, 0.5):
            expected = reference.dsr_threshold(threshold, pruned, 100.0, 0.1)
            assert adapted_threshold(threshold, pruned, 100.0, 0.1) == expected
    assert adapted_threshold(1.0, 89, 100, 0.1) == 2.0
    assert adapted_threshold(1.0, 111, 100, 0.1) == 0.5
    assert adapted_threshold(1.0, 110, 100, 0.1) == 1.0


def test_random_growth() -> None:
    """Free positions that were free before come first, then those just dropped, never one that lives."""
    before = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    kept = torch.tensor([1, 1, 0, 0, 0, 0, 0, 0], dtype=torch.bool)
    seen = set()
    for step in range(60):
        numbers = random_numbers((8,), 7, step, 0)
        grown = grow_random(kept, before, 2, numbers) & ~kept
        assert int(grown.sum()) == 2
        assert not grown[:4].any()
        seen.add(tuple(grown.nonzero().flatten().tolist()))
        assert grow_random(kept, before, 5, numbers)[4:].all()
        assert int(grow_random(kept, before, 5, numbers).sum()) == 7
        assert grow_random(kept, before, 99, numbers).all()
    assert len(seen) == 6  # every pair of four


def test_random_numbers_depend_on_what_they_are_for() -> None:
    draws = [
        random_numbers((40,), *key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**63, 0, 0))
    ]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert not torch.equal(one, other)
    state = torch.random.get_rng_state()
    assert torch.equal(random_numbers((40,), 0, 1, 0), draws[2])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_shares_over_time() -> None:
    assert 0.3 * cosine(0) == pytest.approx(0.3)
    assert 0.3 * cosine(0.5) == pytest.approx(0.15)
    assert 0.3 * cosine(1) == pytest.approx(0.0)


def test_erdos_renyi() -> None:
    """By hand, and the budget is met also when layers would have to be more than dense."""
    shapes = {"a": (64, 64, 3, 3), "b": (128, 64, 3, 3), "c": (10, 128)}
    found = erdos_renyi_densities(shapes, 0.1)
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    eps = (0.1 * sum(weights.values()) - 1280) / (134 + 198)  # c would need 3,285 of its 1,280 weights
    assert found == pytest.approx({"a": eps * 134 / 36864, "b": eps * 198 / 73728, "c": 1.0})
    for density in (0.02, 0.1, 0.3, 0.6, 0.95, 1.0):
        found = erdos_renyi_densities(shapes, density)
        assert all(0 < value <= 1 for value in found.values())
        assert sum(found[name] * weights[name] for name in shapes) == pytest.approx(
            density * sum(weights.values())
        )
        free = [name for name in shapes if found[name] < 1]
        ratios = [found[name] * weights[name] / sum(shapes[name]) for name in free]
        assert ratios == pytest.approx(ratios[:1] * len(ratios))
        for name in set(shapes) - set(free):  # dense because its share would be more than all
            assert not free or ratios[0] * sum(shapes[name]) >= weights[name]


def test_units() -> None:
    weight = draw((4, 3, 3, 3), 0)
    assert torch.allclose(unit_scores(weight, "kernel")[:, :, 0, 0], weight.abs().sum(dim=(2, 3)) / 9)
    assert torch.equal(unit_scores(weight, "weight"), weight.abs())
    units = random_units((4, 3, 1, 1), 6, 0, 0)
    mask = weights_of(units, (4, 3, 3, 3), "kernel")
    assert mask.shape == weight.shape
    assert torch.equal(UNITS["kernel"].units(mask), units)
    assert [UNITS[kind].size((4, 3, 3, 3)) for kind in ("weight", "kernel")] == [1, 9]
    assert UNITS["kernel"].size((10, 5, 1, 1)) == 1
    assert int(random_units((7, 9), 19, 0, 0).sum()) == 19
    assert largest(torch.tensor([2.0, 3.0, 3.0, 2.0]), 3).tolist() == [True, True, True, False]
