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
        sizes: weights of a unit of each layer.
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

    def counts(self, densities: Mapping[str, float]) -> dict[str, int]:
        """Units per layer for densities, at least one."""
        return {name: units_at(densities[name], alive.numel()) for name, alive in self.alive.items()}

    def lost(self, kept: Units) -> dict[str, int]:
        """Units per layer that live now and are not among the kept."""
        return {name: int(alive.sum()) - int(kept[name].sum()) for name, alive in self.alive.items()}

    def missing(self, kept: Units, counts: Mapping[str, int]) -> dict[str, int]:
        """Units per layer that the kept lack to these counts."""
        return {name: max(counts[name] - int(kept[name].sum()), 0) for name in kept}

    def keep(self, counts: Mapping[str, int]) -> Units:
        """The best of the active units of each layer."""
        return {name: keep_largest(self.scores[name], self.alive[name], counts[name]) for name in self.alive}

    def weights(self, units: Units) -> int:
        """Weights of units."""
        return sum(int(mask.sum()) * self.sizes[name] for name, mask in units.items())

    def by_survivors(self, kept: Units, budget: int) -> dict[str, int]:
        """Units per layer that grow up to a number of weights, in proportion to what is kept there (DSR)."""
        names = list(kept)
        survivors = [int(kept[name].sum()) * self.sizes[name] for name in names]
        free = [kept[name].numel() - int(kept[name].sum()) for name in names]
        shares = growth_shares(budget - sum(survivors), survivors, free, [self.sizes[name] for name in names])
        return dict(zip(names, shares, strict=True))


DropRule: TypeAlias = Callable[[Update, float], Units]
"""(update, share of the living that is to go) -> the units that stay."""
GrowthRule: TypeAlias = Callable[[Update, Units, Mapping[str, int]], Units]
"""(update, the units that stay, how many grow in each layer) -> the units that live afterwards."""


def units_at(density: float, total: int) -> int:
    """How many of a layer's units live at a density, at least one."""
    return min(max(round(density * total), 1), total)


def random_numbers(shape: Sequence[int], seed: int, step: int, layer: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 on the CPU, that depend on these four and on nothing before."""
    state = np.random.SeedSequence([seed, step, layer]).generate_state(2, np.uint32)
    generator = torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def largest(scores: Tensor, count: int) -> Tensor:
    """Bool of the same shape: the ``count`` largest scores; ties go to the first."""
    order = scores.flatten().sort(descending=True, stable=True).indices[:count]
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[order] = True
    return chosen.view(scores.shape)


def random_units(shape: Sequence[int], density: float, seed: int, layer: int) -> Tensor:
    """Units that live at the beginning, at random: bool on the CPU, at least one of them."""
    return largest(random_numbers(shape, seed, 0, layer), units_at(density, math.prod(shape)))


# ---- drop -----------------------------------------------------------------------------------


def keep_largest(magnitudes: Tensor, alive: Tensor, count: int) -> Tensor:
    """Drop the smallest until ``count`` of those alive are left (RigL Algorithm 1). Bool."""
    return largest(magnitudes.masked_fill(~alive, -1.0), min(count, int(alive.sum())))


def keep_above(magnitudes: Tensor, alive: Tensor, threshold: float) -> Tensor:
    """Drop what is below the threshold (DSR Algorithm 1, "prune by threshold"); one unit stays. Bool."""
    kept = alive & (magnitudes >= threshold)
    return kept if bool(kept.any()) else keep_largest(magnitudes, alive, 1)


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
    """RigL: in each layer a share of the active units, the smallest; one stays."""
    counts = {name: int(alive.sum()) for name, alive in now.alive.items()}
    return now.keep({name: max(count - math.floor(share * count), 1) for name, count in counts.items()})


def smallest_of_network(now: Update, share: float) -> Units:
    """A share of the active weights, the smallest units of all layers together; one of each layer stays.

    Units are kept from the best on until no further one fits; ties go to the first.
    """
    budget = now.weights(now.alive) - math.floor(share * now.weights(now.alive))
    return best_of_network(now, budget)


def best_of_network(now: Update, budget: int) -> Units:
    """The best active units of all layers together, of this many weights; one of each layer at the least."""
    kept = now.keep(dict.fromkeys(now.alive, 1))
    flat = [now.scores[name].masked_fill(~now.alive[name], -1.0).flatten() for name in now.alive]
    flat = [part.masked_fill(kept[name].flatten(), torch.inf) for part, name in zip(flat, kept, strict=True)]
    sizes = [
        torch.full_like(part, now.sizes[name], dtype=torch.float64)
        for part, name in zip(flat, kept, strict=True)
    ]
    scores = torch.cat(flat)
    order = scores.sort(descending=True, stable=True).indices
    fits = torch.cat(sizes)[order].cumsum(0) <= max(budget, now.weights(kept))
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[order] = fits
    parts = torch.split(chosen, [part.numel() for part in flat])
    return {name: part.view_as(kept[name]) & now.alive[name] for name, part in zip(kept, parts, strict=True)}


def below_threshold(now: Update, share: float) -> Units:
    """DSR: in all layers what is below one threshold, which adapts until ``share`` of the weights goes."""
    threshold = now.memory.setdefault("threshold", FIRST_THRESHOLD)
    kept = {name: keep_above(now.scores[name], alive, threshold) for name, alive in now.alive.items()}
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


def grow_random(kept: Tensor, before: Tensor, count: int, numbers: Tensor) -> Tensor:
    """Let ``count`` units grow at random free positions (DSR, SET); those just dropped come last.

    ``kept`` are the units that live, ``before`` those before the drop, ``numbers`` the draw, in [0, 1).
    """
    order = numbers.to(kept.device) + (~before).double()
    return kept | largest(order.masked_fill(kept, -1.0), min(count, int((~kept).sum())))


def grow_steepest(kept: Tensor, count: int, gradients: Tensor) -> Tensor:
    """Let the ``count`` free units with the largest gradient grow (RigL Algorithm 1).

    "I_grow = ArgTopK over i not in theta without I_active": what has just been dropped may come back.
    """
    return kept | largest(gradients.masked_fill(kept, -1.0), min(count, int((~kept).sum())))


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
    return {name: grow_steepest(kept[name], counts[name], now.gradients[name]) for name in kept}


grow_by_gradient.reads_gradient = True  # type: ignore[attr-defined]


def grow_anywhere(now: Update, kept: Units, counts: Mapping[str, int]) -> Units:
    """In each layer at random positions (DSR, SET)."""
    grown = {}
    for number, name in enumerate(kept):
        numbers = random_numbers(kept[name].shape, now.seed, now.seen, number)
        grown[name] = grow_random(kept[name], now.alive[name], counts[name], numbers)
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
