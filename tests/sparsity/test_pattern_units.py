"""Patterns that move, against plain loops, on scores with ties; and pools whose patterns are far apart."""

from __future__ import annotations

import math

import moving_pattern_reference as reference
import pytest
import torch
from torch import Tensor

from clicktrain.sparsity.pattern_units import PatternUnit
from clicktrain.sparsity.patterns import Pattern, PatternPool, all_patterns, fixed_pool
from clicktrain.sparsity.regrowth import Update, grow_by_gradient, smallest_of_layers

POOLS = {
    "4": fixed_pool(4),
    "12": fixed_pool(12),
    "16": fixed_pool(16),
    "126": PatternPool(all_patterns(4)),
    "84": PatternPool(all_patterns(3)),
    # Neighbors share two, one and no positions of three.
    "apart": PatternPool.from_bits([0b111, 0b110_001, 0b111_000_000, 0b100_010_001], (3, 3)),
    "alone": PatternPool((Pattern(0b11011),)),
}


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    """Eighths of small whole numbers: exact in every sum, with many ties and zeros."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-6, 7, shape, generator=generator).float() / 8


def start(shape: tuple[int, ...], pool: PatternPool, kernels: int, seed: int) -> Tensor:
    """A mask with `kernels` kernels in every filter, of any patterns."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(shape[:2], generator=generator).argsort(dim=1)
    ids = torch.randint(len(pool), shape[:2], generator=generator)
    return pool.masks()[ids] & (order < kernels)[..., None, None]


def moved(
    unit: PatternUnit, weight: Tensor, grad: Tensor, mask: Tensor, share: float
) -> tuple[Tensor, int, Tensor]:
    """One update of RigL within filters: the mask, changed patterns, kernels that stayed."""
    view = tuple(weight.shape)
    scores, slopes = unit.scores(weight.abs()), unit.scores(grad.abs())
    rows = {"a": view[0]}
    now = Update(
        {"a": unit.units(mask)}, {"a": scores}, {"a": slopes}, {"a": view}, {"a": unit.size(view)}, rows=rows
    )
    kept = smallest_of_layers(now, share)
    alive = grow_by_gradient(now, kept, now.lost(kept))
    result = unit.rearranged(mask, kept["a"], alive["a"], weight.abs(), grad.abs(), view[0])
    return result.mask, result.changed, kept["a"]


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize(
    ("shape", "kernels"), [((6, 9, 3, 3), 5), ((5, 4, 3, 3), 3), ((3, 7, 3, 3), 7)], ids=str
)
@pytest.mark.parametrize("share", [0.0, 0.17, 0.5, 0.9])
def test_an_update(name: str, shape: tuple[int, ...], kernels: int, share: float) -> None:
    if name == "alone" and share > 0.5:
        share = 0.4
    pool, unit = POOLS[name], PatternUnit(POOLS[name])
    mask = start(shape, pool, kernels, seed=int(100 * share) + len(pool))
    weight, grad = draw(shape, 3) * mask, draw(shape, 4)
    now, changed, _ = moved(unit, weight, grad, mask, share)
    sets = [frozenset(i for i in range(9) if p.bits >> i & 1) for p in pool.patterns]
    lists = [t.flatten(2).tolist() for t in (weight, grad, mask)]
    if len(pool) > 1:
        expected, count = reference.update(*lists, sets, share)
        found = [[frozenset(k.nonzero().flatten().tolist()) for k in row] for row in now.flatten(2)]
        assert found == expected
        assert changed == count
    each = now.flatten(2).any(dim=2).sum(dim=1)
    assert each.tolist() == [kernels] * shape[0]
    assert set(now.flatten(1).sum(dim=1).tolist()) == {kernels * pool.entries}
    ids = unit.ids(now)
    assert torch.equal(pool.masks()[ids] & unit.units(now), now)


def test_what_stays_keeps_all_but_one_position() -> None:
    unit = PatternUnit(PatternPool(all_patterns(4)))
    mask = start((8, 12, 3, 3), unit.pool, 6, seed=1)
    weight, grad = torch.randn(8, 12, 3, 3) * mask, torch.randn(8, 12, 3, 3)
    now, changed, kept = moved(unit, weight, grad, mask, 0.3)
    overlap = (now & mask).flatten(2).sum(dim=2)[kept[..., 0, 0]]
    assert set(overlap.tolist()) == {3, 4}
    assert int((overlap == 3).sum()) == changed > 0
    assert changed <= math.floor(0.3 * int(kept.sum()))


def test_kernels_that_were_whole_take_their_best_patterns() -> None:
    unit = PatternUnit(fixed_pool(12))
    weight = torch.randn(4, 5, 3, 3)
    everything = torch.ones(4, 5, 1, 1, dtype=torch.bool)
    kept = everything.clone()
    kept[:, 3:] = False
    now = unit.rearranged(None, kept, kept, weight.abs(), weight.abs()).mask
    assert not now[:, 3:].any()
    sums = torch.einsum("fcrs,prs->fcp", weight.abs(), unit.pool.masks().float())
    assert torch.allclose((weight.abs() * now).sum(dim=(2, 3))[:, :3], sums.amax(dim=2)[:, :3])
    assert torch.allclose(unit.scores(weight.abs())[..., 0, 0], sums.amax(dim=2) / 4)


def test_a_unit_takes_a_layer_apart_and_puts_it_together() -> None:
    unit = PatternUnit(fixed_pool(8))
    assert unit.shape((5, 6, 3, 3)) == (5, 6, 1, 1)
    assert unit.size((5, 6, 3, 3)) == 4
    units = torch.rand(5, 6, 1, 1) < 0.5
    assert torch.equal(unit.units(unit.weights(units, (5, 6, 3, 3))), units)
    scores = torch.rand(5, 6, 3, 3)
    assert torch.equal(unit.units(unit.first(units, scores)), units)
