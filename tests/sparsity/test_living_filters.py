"""No filter without a nonzero weight; and units that compete within filters."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from clicktrain.sparsity.distributions import densities_below
from clicktrain.sparsity.living_filters import (
    constant_filters,
    outstanding_units,
    random_units,
    with_living_filters,
)
from clicktrain.sparsity.regrowth import (
    Update,
    below_threshold,
    best_of_network,
    filled_up,
    keep_largest,
    largest,
    smallest_of_layers,
    units_at,
)

sys.path.append(str(Path(__file__).parents[1] / "papers"))
import dynamic_reference as reference


def test_filters_against_loops() -> None:
    chance = random.Random(0)
    changed = 0
    for _ in range(300):
        filters, each = chance.randint(1, 5), chance.randint(1, 6)
        size = filters * each
        before = [chance.random() < 0.6 for _ in range(size)]
        weights = [[chance.choice([0, 0, 1, 2, 3]) / 4 if live else 0.0] for live in before]
        gradients = [[chance.choice([0, 1, 2]) / 4] for _ in range(size)]
        kept = [live and chance.random() < 0.5 for live in before]
        alive = [k or chance.random() < 0.3 for k in kept]
        expected = reference.with_living_filters(weights, gradients, before, kept, alive, filters)
        had, slope, stay, now = (
            torch.tensor(values).view(filters, each, 1, 1)
            for values in (
                [w[0] for w in weights], [g[0] for g in gradients], kept, alive,
            )
        )  # fmt: skip
        order = torch.where(stay, 1 + had, slope / (1 + slope))
        found = with_living_filters(now, had, order)
        assert found.flatten().tolist() == expected
        assert int(found.sum()) == sum(alive)
        changed += found.flatten().tolist() != alive
    assert changed > 50


def test_in_rows_a_filter_gives_up_a_unit_of_its_own() -> None:
    scores = torch.tensor([[3.0, 0.0, 0.0, 5.0], [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    alive = torch.tensor([[False, True, True, False], [True, False, True, False], [True, True, False, False]])
    order = torch.tensor([[0.0, 2.0, 2.0, 0.0], [1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    found = with_living_filters(alive, scores, order, rows=3)
    assert found.tolist() == [
        [False, True, False, True], [True, False, True, False], [True, True, False, False],
    ]  # fmt: skip
    assert constant_filters(alive, scores).tolist() == [True, False, False]
    assert constant_filters(found, scores).tolist() == [False, False, False]


def test_the_identity_stands_out_and_random_weights_do_not() -> None:
    layer = nn.Conv2d(16, 24, 3)
    nn.init.dirac_(layer.weight[:16].data)
    energies = layer.weight.detach().square()
    found = outstanding_units(energies)
    assert found.nonzero().tolist() == [[i, i, 1, 1] for i in range(16)]
    for draw in (nn.init.kaiming_uniform_, nn.init.kaiming_normal_, nn.init.orthogonal_):
        weight = draw(torch.empty(64, 16, 3, 3))  # type: ignore[operator]
        assert not outstanding_units(weight.square()).any()
    assert outstanding_units(torch.tensor([[0.0, 2.0, 0.0], [1.0, 2.0, 0.0]])).tolist() == [
        [False, True, False], [False, False, False],
    ]  # fmt: skip
    assert not outstanding_units(torch.zeros(3, 4)).any()
    units = random_units((24, 16, 3, 3), 173, 1, 2, first=found)
    assert units[found].all()
    assert int(units.sum()) == 173


def test_units_at_densities() -> None:
    layers = {"a": (63, 1, 1), "b": (4, 1, 1), "c": (12, 1, 9)}
    weights = {"a": 63, "b": 4, "c": 108}
    assert units_at({"a": 0.3, "b": 0.01, "c": 0.5}, layers, weights) == {"a": 19, "b": 1, "c": 6}
    # In rows of 8 and 5 kernels with 4 of 9 weights: 3.38 and 2.81 kernels, 27 and 11.2 of a sum of 38.2.
    layers, weights = {"a": (64, 8, 4), "b": (20, 4, 4)}, {"a": 576, "b": 180}
    found = units_at({"a": 0.1875, "b": 0.25}, layers, weights)
    assert found == {"a": 24, "b": 12}
    # Both would be rounded down by themselves: the larger remainder is rounded up.
    assert units_at({"a": 0.19, "b": 0.21}, layers, weights) == {"a": 32, "b": 8}
    assert units_at({"a": 0.001, "b": 0.001}, layers, weights) == {"a": 8, "b": 4}
    assert units_at({"a": 0.9, "b": 0.9}, layers, weights) == {"a": 64, "b": 20}


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_rows_keep_equally_many(rows: int) -> None:
    scores = torch.randint(0, 5, (12, 5), generator=torch.Generator().manual_seed(rows)).float()
    for count in range(61):
        found = largest(scores, count, rows)
        table, chosen = scores.view(rows, -1), found.view(rows, -1)
        assert int(chosen.sum()) == count
        assert int(chosen.sum(dim=1).max() - chosen.sum(dim=1).min()) <= 1
        for own, taken in zip(table, chosen, strict=True):
            if taken.any() and not taken.all():
                assert own[taken].min() >= own[~taken].max()
        more = filled_up(found, 60 // rows * rows - count if count % rows else 0, 4 - scores, rows)
        assert (found & ~more).sum() == 0
        if count % rows:
            assert more.all()


def test_drop_rules_within_filters() -> None:
    generator = torch.Generator().manual_seed(0)
    alive, scores = {}, {}
    for name, shape in (("a", (4, 10, 1, 1)), ("b", (3, 6, 1, 1))):
        scores[name] = torch.rand(shape, generator=generator)
        alive[name] = keep_largest(
            torch.rand(shape, generator=generator), torch.ones(shape).bool(), shape[0] * 5, shape[0]
        )
    shapes = {"a": (4, 10, 3, 3), "b": (3, 6, 3, 3)}
    sizes, rows = {"a": 4, "b": 4}, {"a": 4, "b": 3}
    now = Update(alive, scores, {}, shapes, sizes, memory={"threshold": 0.5}, rows=rows)
    assert all(int(m.sum(dim=1).min()) == 5 == int(m.sum(dim=1).max()) for m in alive.values())
    ranked = {
        name: scores[name]
        .flatten(1)
        .masked_fill(~alive[name].flatten(1), -1)
        .sort(dim=1, descending=True)
        .values[:, :5]
        .mean(dim=0)
        for name in alive
    }
    kept = below_threshold(now, 0.1)
    for name, mask in kept.items():
        count = max(int((ranked[name] >= 0.5).sum()), 1)
        assert mask.flatten(1).sum(dim=1).tolist() == [count] * rows[name]
        assert not (mask & ~alive[name]).any()
    columns = sorted(
        ((float(value), name, 4 * rows[name]) for name in ranked for value in ranked[name][1:]), reverse=True
    )
    budget = 90
    left, counts = budget - 4 * 7, {"a": 1, "b": 1}
    for _, name, price in columns:
        if price > left:
            break
        left -= price
        counts[name] += 1
    best = best_of_network(now, budget)
    assert {name: mask.flatten(1).sum(dim=1).tolist() for name, mask in best.items()} == {
        name: [counts[name]] * rows[name] for name in counts
    }
    dropped = smallest_of_layers(now, 0.33)  # 20 - 6 = 14 of four filters, 15 - 4 = 11 of three
    assert sorted(dropped["a"].flatten(1).sum(dim=1).tolist()) == [3, 3, 4, 4]
    assert sorted(dropped["b"].flatten(1).sum(dim=1).tolist()) == [3, 4, 4]


def test_densities_below_what_units_allow() -> None:
    shapes = {"a": (4, 4), "b": (8, 8), "c": (10, 10)}
    wanted = {"a": 1.0, "b": 0.5, "c": 0.2}
    everything = dict.fromkeys(shapes, 1.0)
    assert densities_below(wanted, shapes, everything) == wanted
    most = {"a": 0.4, "b": 1.0, "c": 1.0}
    found = densities_below(wanted, shapes, most)
    assert found["a"] == 0.4
    assert found["b"] / found["c"] == pytest.approx(2.5)
    total = sum(found[n] * s[0] * s[1] for n, s in shapes.items())
    assert total == pytest.approx(16 + 32 + 20)
    assert densities_below(wanted, shapes, dict.fromkeys(shapes, 0.1)) == dict.fromkeys(shapes, 0.1)
