"""ADMM pattern pruning against plain loops: pattern set, projections, every step of a run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import admm_reference as reference
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.methods import AdmmPatterns
from clicktrain.sparsity.admm import nearest_mask
from clicktrain.sparsity.pattern_pool import PatternVotes, add_votes, natural_patterns, select_pool
from clicktrain.sparsity.pattern_units import PatternUnit
from clicktrain.sparsity.patterns import PatternPool
from clicktrain.sparsity.units import UNITS


def lists(tensor: Tensor) -> reference.Layer:
    """[F, C, R, S] as the reference has it."""
    found: reference.Layer = tensor.detach().flatten(2).tolist()
    return found


def patterns_of(pool: PatternPool) -> list[reference.Pattern]:
    positions = math.prod(pool.shape)
    return [frozenset(i for i in range(positions) if p.bits >> i & 1) for p in pool.patterns]


def weights(*shape: int, seed: int = 0, coarse: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * values).round() if coarse else values


@pytest.mark.parametrize("shape", [(3, 3), (5, 5), (1, 3), (2, 2), (4, 3)])
@pytest.mark.parametrize("coarse", [False, True], ids=["", "ties"])
def test_natural_patterns(shape: tuple[int, int], coarse: bool) -> None:
    r, s = shape
    weight = weights(4, 5, r, s, coarse=coarse)
    center = (r * s) // 2 if r % 2 and s % 2 else None
    for entries in (1, 2, r * s):
        found = natural_patterns(weight.square(), entries)
        expected = [[reference.bits(reference.natural_pattern(k, entries, center)) for k in row]
                    for row in lists(weight)]  # fmt: skip
        assert found.tolist() == expected


def test_there_are_56_natural_patterns_of_four_positions() -> None:
    found = natural_patterns(weights(64, 64, 3, 3).square(), 4)
    assert len(found.unique()) == math.comb(8, 3) == 56
    assert bool((found >> 4 & 1).all())  # all have the center


@pytest.mark.parametrize("size", [1, 6, 200])
def test_the_pattern_set_of_a_network(size: int) -> None:
    layers = [weights(6, 5, 3, 3, seed=seed, coarse=True) for seed in range(3)]
    votes = PatternVotes.empty()
    for layer in layers:
        votes = add_votes(votes, natural_patterns(layer.square(), 4), (3, 3))
    found = patterns_of(select_pool(votes, size, (3, 3)))
    assert found == reference.pool([lists(layer) for layer in layers], 4, size, 4)


@pytest.mark.parametrize("seed", range(4))
def test_projections(seed: int) -> None:
    """Those of the loops, and no member of the constraint is nearer."""
    layer = weights(2, 3, 3, 3, seed=seed)
    pool = PatternPool.from_bits([0b011011000, 0b000110110, 0b010111000, 0b110010001], (3, 3))
    unit, scores = PatternUnit(pool), layer.square()
    both = layer * nearest_mask(scores, unit, 2 * 2, rows=2)
    assert lists(both) == reference.on_both(lists(layer), patterns_of(pool), 2)
    shortest = reference.the_nearest(lists(layer), patterns_of(pool), 2)
    assert reference.distance(lists(layer), lists(both)) == pytest.approx(shortest)
    every = layer * nearest_mask(scores, unit, 2 * 3, rows=2)
    assert lists(every) == reference.on_patterns(lists(layer), patterns_of(pool))
    kernels = layer * nearest_mask(scores, UNITS.resolve("kernel"), 2 * 2, rows=2)
    assert lists(kernels) == reference.few_kernels(lists(layer), 2)
    singles = nearest_mask(scores, UNITS.resolve("weight"), 10)
    assert bool((layer.abs()[singles].min() >= layer.abs()[~singles].max()).all())
    assert int(singles.sum()) == 10


class Net(nn.Module):
    """Two layers of 3x3 kernels and one of 1x1 to prune, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.one = nn.Conv2d(4, 6, 3, padding=1)
        self.point = nn.Conv2d(6, 6, 1)
        self.two = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(F.relu(self.stem(x))))
        x = F.relu(self.two(F.relu(self.point(x))))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


LAYERS = ("one", "point", "two")
STEPS, END, ITERATIONS = 14, 11, 4
SCHEDULE = {"rho": 0.02, "rho_last": 0.5}
MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


def batch(number: int) -> tuple[Tensor, Tensor]:
    y = torch.arange(6) % 3
    return weights(6, 1, 5, 5, seed=number) + y.view(-1, 1, 1, 1), y


def made(optimizer: str) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(3)
    model = Net().double()
    return model, MAKERS[optimizer](model.parameters())


class Literal:
    """A run in which the optimizer minimizes the loss with the quadratic terms, by autograd."""

    def __init__(self, split: bool, optimizer: str, counts: dict[str, int]) -> None:
        self.model, self.optimizer = made(optimizer)
        self.split, self.counts = split, counts
        threes = [lists(self.weight(name)) for name in ("one", "two")]
        self.patterns = {
            **dict.fromkeys(("one", "two"), reference.pool(threes, 4, 6, 4)),
            "point": [frozenset({0})],
        }
        self.auxiliary = {key: self.project(key, lists(self.weight(key[1]))) for key in self.pairs()}
        self.duals = {key: reference.times(lists(self.weight(key[1])), 0.0) for key in self.pairs()}
        self.iteration = 0

    def weight(self, name: str) -> nn.Parameter:
        weight = self.model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def pairs(self) -> list[tuple[str, str]]:
        """(constraint, layer); a 1x1 convolution has nothing but kernels."""
        both = [("patterns", n) for n in ("one", "two")] + [("kernels", n) for n in ("one", "two")]
        return [*both, ("units", "point")] if self.split else [("units", name) for name in LAYERS]

    def project(self, key: tuple[str, str], layer: reference.Layer) -> reference.Layer:
        constraint, name = key
        if constraint == "patterns":
            return reference.on_patterns(layer, self.patterns[name])
        if constraint == "kernels":
            return reference.few_kernels(layer, self.counts[name])
        return reference.on_both(layer, self.patterns[name], self.counts[name])

    def rho(self, iteration: int) -> float:
        return reference.rho_of(iteration, ITERATIONS, SCHEDULE["rho"], SCHEDULE["rho_last"])

    def step(self, number: int) -> None:
        x, y = batch(number)
        loss = F.cross_entropy(self.model(x), y)
        for key in self.pairs():
            weight = self.weight(key[1])
            z, u = (torch.tensor(part[key], dtype=weight.dtype).view_as(weight)
                    for part in (self.auxiliary, self.duals))  # fmt: skip
            loss = loss + self.rho(self.iteration) / 2 * (weight - z + u).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def update(self) -> None:
        """Z, then U, which is then scaled for the next rho."""
        for key in self.pairs():
            w, u = lists(self.weight(key[1])), self.duals[key]
            z = self.project(key, reference.added(w, u))
            self.auxiliary[key] = z
            u = reference.added(u, reference.added(w, z, -1.0))
            self.duals[key] = reference.times(u, self.rho(self.iteration) / self.rho(self.iteration + 1))
        self.iteration += 1


@pytest.mark.parametrize("optimizer", MAKERS)
@pytest.mark.parametrize("constraints", ["joint", "split"])
def test_every_step_of_a_run(constraints: str, optimizer: str) -> None:
    model, own = made(optimizer)
    method = AdmmPatterns(
        compression=3,
        patterns=6,
        stop=END / STEPS,
        iterations=ITERATIONS,
        constraints=constraints,
        **SCHEDULE,
    )
    pruner = method.attach(model, own, epochs=2, steps_per_epoch=STEPS // 2)
    pool = next(event for event in pruner.events if event["event"] == "pool")
    rows = {row.name: row for row in pruner.plan().rows}
    counts = {name: round(rows[name].density * math.prod(rows[name].shape) / rows[name].shape[0] /
                          (1 if name == "point" else 4)) for name in LAYERS}  # fmt: skip
    assert all(1 <= counts[name] < rows[name].shape[1] for name in LAYERS)
    literal = Literal(constraints == "split", optimizer, counts)
    assert [p["bits"] for p in pool["pools"][0]["patterns"]] == [
        reference.bits(pattern) for pattern in literal.patterns["one"]
    ]
    due = [math.ceil(k * END / ITERATIONS) for k in range(1, ITERATIONS)]
    for number in range(END):
        x, y = batch(number)
        loss = F.cross_entropy(model(x), y)
        own.zero_grad()
        loss.backward()
        pruner.observe(loss)
        own.step()
        literal.step(number)
        if number + 1 < END:
            for name in LAYERS:
                theirs = literal.weight(name)
                torch.testing.assert_close(model.get_submodule(name).weight, theirs, rtol=1e-9, atol=1e-12)
            assert not pruner.masks
        if number + 1 in due:
            literal.update()
            state = pruner.state_dict()["state"]
            assert (
                state["iteration"]
                == literal.iteration
                == len([event for event in pruner.events if event["event"] == "admm"])
            )
            assert {(c, n) for c, layers in state["auxiliary"].items() for n in layers} == set(
                literal.pairs()
            )
            for constraint, name in literal.pairs():
                z, u = state["auxiliary"][constraint][name]
                assert_same(z, literal.auxiliary[constraint, name])
                assert_same(u, literal.duals[constraint, name])
            residuals(pruner.events[-1], literal)
    assert literal.iteration == ITERATIONS - 1
    for name in LAYERS:
        final = reference.on_both(lists(literal.weight(name)), literal.patterns[name], counts[name])
        assert_same(model.get_submodule(name).weight, final)
        nonzero = [[[bool(v) for v in kernel] for kernel in row] for row in final]
        assert pruner.masks[name].flatten(2).tolist() == nonzero


def assert_same(found: Any, expected: reference.Layer) -> None:
    torch.testing.assert_close(
        found.detach().flatten(2), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12
    )


def residuals(event: dict[str, Any], literal: Literal) -> None:
    far = sum(
        reference.distance(lists(literal.weight(name)), literal.auxiliary[constraint, name])
        for constraint, name in literal.pairs()
    )
    whole = sum(float(literal.weight(name).detach().square().sum()) for _, name in literal.pairs())
    assert event["residual"] == pytest.approx(math.sqrt(far / whole))
    assert event["rho"] == pytest.approx(literal.rho(literal.iteration))


def test_rho_rises_by_the_same_factor() -> None:
    rho = [reference.rho_of(k, 4, 0.001, 0.1) for k in range(4)]
    assert rho[0] == 0.001
    assert rho[-1] == pytest.approx(0.1)
    factors = [b / a for a, b in itertools.pairwise(rho)]
    assert factors == pytest.approx([factors[0]] * 3)
