"""Drop and grow: the rules by which units leave a network and come back (functions on tensors).

Dynamic sparse reparameterization (Mostafa and Wang, ICML 2019; "DSR" below), RigL (Evci et al., ICML 2020)
and their kin are a drop rule x a growth rule x a distribution over layers x an interval, on units that are
single weights or whole kernels. `clicktrain.methods.masks.moving` composes them over a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from clicktrain.sparsity.guard import guard_of, mask_problem
from clicktrain.sparsity.registry import Registry, smallest

Units: TypeAlias = dict[str, Tensor]
"""Layer name -> one value per unit."""
FIRST_THRESHOLD = 0.001
"""H where it is not given."""
TOLERANCE = 0.1
"""delta where it is not given."""


@dataclass(frozen=True, slots=True)
class Update:
    """What the rules see when units are to be dropped or to grow.

    Attributes:
        alive: bool, the units that live.
        scores: larger = keep.
        gradients: mean absolute gradient of every unit, dead ones included; empty if nobody reads them.
        shapes: of the layers' weights.
        sizes: kept weights of a unit of each layer.
        rows: equal parts of a layer, along its filters, in which equally many units live; 1 if not given.
        done: share of the time of all updates that is past.
        seed, seen: what random numbers depend on: the run's seed, batches seen.
        memory: numbers that a rule keeps from update to update.
    """

    alive: Units
    scores: Units
    gradients: Units
    shapes: Mapping[str, Sequence[int]]
    sizes: Mapping[str, int]
    done: float = 0.0
    seed: int = 0
    seen: int = 0
    memory: MutableMapping[str, float] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)

    def rows_of(self, name: str) -> int:
        """Parts of a layer in which equally many units live: its filters, or 1 for the whole layer."""
        return self.rows.get(name, 1)

    def most(self, name: str) -> float:
        """Density of a layer in which every unit lives: below 1 if pruned positions are left inside units."""
        return self.alive[name].numel() * self.sizes[name] / math.prod(self.shapes[name])

    def counts(self, densities: Mapping[str, float]) -> dict[str, int]:
        """Units per layer for densities, at least one, or one of each row."""
        layers = {
            name: (alive.numel(), self.rows_of(name), self.sizes[name]) for name, alive in self.alive.items()
        }
        weights = {name: math.prod(shape) for name, shape in self.shapes.items()}
        return units_at(densities, layers, weights)

    def lost(self, kept: Units) -> dict[str, int]:
        """Units per layer that live now and are not among the kept."""
        return {name: int(alive.sum()) - int(kept[name].sum()) for name, alive in self.alive.items()}

    def missing(self, kept: Units, counts: Mapping[str, int]) -> dict[str, int]:
        """Units per layer that the kept lack to these counts."""
        return {name: max(counts[name] - int(kept[name].sum()), 0) for name in kept}

    def keep(self, counts: Mapping[str, int]) -> Units:
        """The best of the active units of each layer, in every row of it equally many."""
        return {
            name: keep_largest(self.scores[name], self.alive[name], counts[name], self.rows_of(name))
            for name in self.alive
        }

    def ranked(self, name: str) -> Tensor:
        """Scores of a layer's active units, best first; with rows the means over rows of their k-th best."""
        rows = self.rows_of(name)
        scores = self.scores[name].reshape(rows, -1).masked_fill(~self.alive[name].reshape(rows, -1), -1.0)
        best = scores.sort(dim=1, descending=True).values[:, : int(self.alive[name].sum()) // rows]
        return best.mean(dim=0)

    def weights(self, units: Units) -> int:
        """Weights of units."""
        return sum(int(mask.sum()) * self.sizes[name] for name, mask in units.items())

    def by_survivors(self, kept: Units, budget: int) -> dict[str, int]:
        """Units per layer that grow up to a number of weights, in proportion to what is kept there (DSR)."""
        names = list(kept)
        rows = [self.rows_of(name) for name in names]
        sizes = [self.sizes[name] * parts for name, parts in zip(names, rows, strict=True)]
        survivors = [int(kept[name].sum()) * self.sizes[name] for name in names]
        free = [
            (kept[name].numel() - int(kept[name].sum())) // parts
            for name, parts in zip(names, rows, strict=True)
        ]
        shares = growth_shares(budget - sum(survivors), survivors, free, sizes)
        return {name: share * parts for name, share, parts in zip(names, shares, rows, strict=True)}


DropRule: TypeAlias = Callable[[Update, float], Units]
"""(update, share of the living that is to go) -> the units that stay."""
GrowthRule: TypeAlias = Callable[[Update, Units, Mapping[str, int]], Units]
"""(update, the units that stay, how many grow in each layer) -> the units that live afterwards."""


def units_at(
    densities: Mapping[str, float], layers: Mapping[str, tuple[int, int, int]], weights: Mapping[str, int]
) -> dict[str, int]:
    """How many units of each layer live at its density, at least one, or one of every row.

    A layer without rows is rounded by itself. Steps of the others, one more unit in each row, may be large:
    they are rounded together, by the largest remainders, to come close to the weights that all of them are to
    have.

    Args:
        densities: share of each layer's weights.
        layers: units, rows in which equally many live, and weights of a unit.
        weights: of each layer.
    """
    counts, remainders, left = {}, [], 0.0
    for place, (name, (total, rows, size)) in enumerate(layers.items()):
        exact = min(densities[name] * weights[name] / size, total)
        if rows == 1:
            counts[name] = min(max(round(exact), 1), total)
            continue
        each = max(math.floor(exact / rows + 1e-9), 1)
        counts[name] = each * rows
        left += (exact - counts[name]) * size
        if each < total // rows:
            remainders.append((each - exact / rows, place, name))
    for _, _, name in sorted(remainders):
        _, rows, size = layers[name]
        if left >= rows * size / 2:
            counts[name] += rows
            left -= rows * size
    return counts


def random_numbers(shape: Sequence[int], seed: int, step: int, layer: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 on the CPU, that depend on these four and on nothing before."""
    state = np.random.SeedSequence([seed, step, layer]).generate_state(2, np.uint32)
    generator = torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def largest(scores: Tensor, count: int, rows: int = 1) -> Tensor:
    """Bool of the same shape: the ``count`` largest scores; ties go to the first.

    With ``rows`` equally many of each of these equal parts; where ``rows`` does not divide ``count``, the
    rows whose next score is largest have one more.
    """
    table = scores.reshape(rows, -1)
    each, more = divmod(min(count, table.numel()), rows)
    counts = torch.full((rows,), each, device=scores.device)
    if more:
        following = _numbers(table).topk(each + 1, dim=1).values[:, each]
        counts[following.sort(descending=True, stable=True).indices[:more]] += 1
    return _largest_of_rows(table, counts).view(scores.shape)


def _numbers(table: Tensor) -> Tensor:
    """The same with 0 for what is not a number, as in a run that diverges."""
    return table.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _largest_of_rows(table: Tensor, counts: Tensor) -> Tensor:
    """The ``counts`` [rows] largest of each row, ties to the first: [rows, n] -> bool [rows, n].

    By the last value that is taken, which takes less time than an order of all.
    """
    table = _numbers(table)
    most = int(counts.max()) if len(counts) else 0
    if most == 0:
        return torch.zeros_like(table, dtype=torch.bool)
    last = table.topk(most, dim=1).values.gather(1, (counts - 1).clamp_min(0)[:, None])
    above, ties = table > last, table == last
    left = counts[:, None] - above.sum(dim=1, keepdim=True)
    # In a row of which nothing is taken nothing is above, and nothing left.
    return above | (ties & (ties.cumsum(dim=1) <= left))


def filled_up(kept: Tensor, count: int, worth: Tensor, rows: int = 1) -> Tensor:
    """``kept`` and ``count`` more, those of the largest ``worth`` (0 or more); ties go to the first.

    With ``rows`` each of these equal parts has equally many afterwards, as far as ``count`` goes.
    """
    had = kept.reshape(rows, -1)
    table, have = worth.reshape(rows, -1).masked_fill(had, -1.0), had.sum(dim=1)
    missing = ((int(have.sum()) + count) // rows - have).clamp_min(0)
    grown = _largest_of_rows(table, torch.minimum(missing, table.shape[1] - have))
    return (grown | had).view(kept.shape)


# ---- drop -----------------------------------------------------------------------------------


def keep_largest(magnitudes: Tensor, alive: Tensor, count: int, rows: int = 1) -> Tensor:
    """Drop the smallest until ``count`` of those alive are left (RigL Algorithm 1). Bool."""
    return largest(magnitudes.masked_fill(~alive, -1.0), min(count, int(alive.sum())), rows)


def adapted_threshold(threshold: float, dropped: int, target: float, tolerance: float) -> float:
    """DSR's "adjust pruning threshold": H doubled if too few weights were dropped, halved if too many.

    K, ``dropped``, may be off N_p, ``target``, by the share delta, ``tolerance``; H then stays as it is.
    """
    if dropped < (1 - tolerance) * target:
        return 2 * threshold
    if dropped > (1 + tolerance) * target:
        return threshold / 2
    return threshold


def smallest_of_layers(now: Update, share: float) -> Units:
    """RigL: in each layer a share of the active units, the smallest; one stays, or one of each row."""
    counts = {name: int(alive.sum()) for name, alive in now.alive.items()}
    left = {name: count - math.floor(share * count) for name, count in counts.items()}
    return now.keep({name: max(count, now.rows_of(name)) for name, count in left.items()})


def smallest_of_network(now: Update, share: float) -> Units:
    """A share of the active weights, the smallest units of all layers together; one of each layer stays.

    Units are kept from the best on until no further one fits; ties go to the first.
    """
    budget = now.weights(now.alive) - math.floor(share * now.weights(now.alive))
    return best_of_network(now, budget)


def best_of_network(now: Update, budget: int) -> Units:
    """The best active units of all layers together, of this many weights; one of each layer at the least.

    With rows the competitors are the best units of all rows of a layer, the second best of all rows, ...
    """
    ranked = {name: now.ranked(name) for name in now.alive}
    prices = {name: now.sizes[name] * now.rows_of(name) for name in ranked}
    flat = []
    for part in ranked.values():
        first = part.clone()
        first[:1] = torch.inf
        flat.append(first)
    scores = torch.cat(flat)
    order = scores.sort(descending=True, stable=True).indices
    costs = [torch.full_like(ranked[name], prices[name], dtype=torch.float64) for name in ranked]
    fits = torch.cat(costs)[order].cumsum(0) <= max(budget, sum(prices.values()))
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[order] = fits
    parts = torch.split(chosen, [part.numel() for part in flat])
    return now.keep(
        {name: int(part.sum()) * now.rows_of(name) for name, part in zip(ranked, parts, strict=True)}
    )


def below_threshold(now: Update, share: float) -> Units:
    """DSR: in all layers what is below one threshold, which adapts until ``share`` of the weights goes.

    Algorithm 1, "prune by threshold"; one unit of each layer stays, or one of each row.
    """
    threshold = now.memory.setdefault("threshold", FIRST_THRESHOLD)
    counts = {name: max(int((now.ranked(name) >= threshold).sum()), 1) for name in now.alive}
    kept = now.keep({name: count * now.rows_of(name) for name, count in counts.items()})
    before = now.weights(now.alive)
    dropped, tolerance = before - now.weights(kept), now.memory.get("tolerance", TOLERANCE)
    now.memory["threshold"] = adapted_threshold(threshold, dropped, share * before, tolerance)
    return kept


def _drop_problem(value: Any, now: Update, share: float) -> str | None:
    del share
    wrong = mask_problem(value, now.alive)
    dead = [] if wrong else [name for name, alive in now.alive.items() if bool((value[name] & ~alive).any())]
    return f"keeps pruned units of {dead[0]}" if dead else wrong


def _sample(layers: Sequence[Any]) -> Update:
    """What rules see, of the smallest layer, half of whose weights live."""
    layer = smallest(layers)
    scores = layer.view(layer.weight.detach()).float().abs()
    alive = largest(scores, scores.numel() // 2)
    name, ones = layer.name, torch.ones_like(scores)
    return Update({name: alive}, {name: scores}, {name: ones}, {name: layer.shape}, {name: 1})


DROPS: Registry[DropRule] = Registry(
    "drop rule",
    {"layer": smallest_of_layers, "network": smallest_of_network, "threshold": below_threshold},
    guard=guard_of(
        "drop rule",
        "a function (Update, share that goes) -> {layer: bool mask of those of Update.alive that stay}",
        _drop_problem,
    ),
    trial=lambda rule, layers: rule(_sample(layers), 0.3),
)
DropChoice: TypeAlias = Annotated[str | DropRule, DROPS]


# ---- grow -----------------------------------------------------------------------------------


def grow_random(kept: Tensor, before: Tensor, count: int, numbers: Tensor, rows: int = 1) -> Tensor:
    """Let ``count`` units grow at random free positions (DSR, SET); those just dropped come last.

    ``kept`` are the units that live, ``before`` those before the drop, ``numbers`` the draw, in [0, 1).
    """
    return filled_up(kept, count, numbers.to(kept.device) + (~before).double(), rows)


def grow_steepest(kept: Tensor, count: int, gradients: Tensor, rows: int = 1) -> Tensor:
    """Let the ``count`` free units with the largest gradient grow (RigL Algorithm 1).

    "I_grow = ArgTopK over i not in theta without I_active": what has just been dropped may come back.
    """
    return filled_up(kept, count, gradients, rows)


def growth_shares(
    weights: int, survivors: Sequence[int], free: Sequence[int], sizes: Sequence[int]
) -> list[int]:
    """How many units grow in each layer: ``l_i / L * K`` weights (DSR Algorithm 1).

    Whole units, by largest remainder (ties to the first). A layer has no more than its free units; what it
    cannot take goes to the others in the same proportion. With units of several weights a rest smaller than a
    unit may stay.

    Args:
        weights: K, weights to grow in all layers.
        survivors: l_i, active weights per layer.
        free: pruned units per layer.
        sizes: weights of a unit per layer.
    """
    grown = [0] * len(free)
    left = max(weights, 0)
    while True:
        able = [i for i in range(len(free)) if grown[i] < free[i] and sizes[i] <= left]
        if not able:
            return grown
        total = sum(survivors[i] for i in able)
        exact = {i: Fraction(left * survivors[i], total * sizes[i]) for i in able}
        whole = {i: min(math.floor(exact[i]), free[i] - grown[i]) for i in able}
        for i in able:
            grown[i] += whole[i]
            left -= whole[i] * sizes[i]
        if all(whole[i] == math.floor(exact[i]) for i in able):  # nobody is full: the remainders decide
            for i in sorted(able, key=lambda i: (whole[i] - exact[i], i)):
                if grown[i] < free[i] and sizes[i] <= left:
                    grown[i] += 1
                    left -= sizes[i]


def grow_by_gradient(now: Update, kept: Units, counts: Mapping[str, int]) -> Units:
    """In each layer where the gradient is largest (RigL)."""
    return {
        name: grow_steepest(kept[name], counts[name], now.gradients[name], now.rows_of(name)) for name in kept
    }


grow_by_gradient.reads_gradient = True  # type: ignore[attr-defined]


def grow_anywhere(now: Update, kept: Units, counts: Mapping[str, int]) -> Units:
    """In each layer at random positions (DSR, SET)."""
    grown = {}
    for number, name in enumerate(kept):
        numbers = random_numbers(kept[name].shape, now.seed, now.seen, number)
        grown[name] = grow_random(kept[name], now.alive[name], counts[name], numbers, now.rows_of(name))
    return grown


grow_anywhere.reads_gradient = False  # type: ignore[attr-defined]


def _growth_problem(value: Any, now: Update, kept: Units, counts: Mapping[str, int]) -> str | None:
    if (wrong := mask_problem(value, now.alive)) is not None:
        return wrong
    for name, stays in kept.items():
        if bool((stays & ~value[name]).any()):
            return f"dropped units of {name} that were to stay"
        if (grown := int(value[name].sum()) - int(stays.sum())) > counts[name]:
            return f"let {grown} units of {name} grow, not {counts[name]}"
        each = value[name].reshape(now.rows_of(name), -1).sum(dim=1)
        if bool((each != each[0]).any()):
            few, many = int(each.min()), int(each.max())
            return f"left from {few} to {many} units to the filters of {name}: all need as many"
    return None


def _try_growth(rule: GrowthRule, layers: Sequence[Any]) -> None:
    now = _sample(layers)
    rule(now, now.alive, dict.fromkeys(now.alive, 1))


GROWTHS: Registry[GrowthRule] = Registry(
    "growth",
    {"gradient": grow_by_gradient, "random": grow_anywhere},
    guard=guard_of(
        "growth",
        "a function (Update, masks that stay, {layer: count}) -> {layer: mask of these and up to count more}",
        _growth_problem,
    ),
    trial=_try_growth,
)
GrowthChoice: TypeAlias = Annotated[str | GrowthRule, GROWTHS]
