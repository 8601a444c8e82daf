"""Dynamic sparse training: weights are dropped and as many grow elsewhere (functions on tensors).

Dynamic sparse reparameterization (Mostafa and Wang, ICML 2019; "DSR" below) and RigL (Evci et al., ICML 2020)
are both drop rule x growth rule x distribution over layers x interval, on units that are single weights or
whole kernels. Here are the rules; `clicktrain.methods.masks.dynamic` composes them over a run.

A layer's units have the shape of its weight, or [F, C] for the kernels of a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

UnitKind = Literal["weight", "kernel"]
"""What is dropped and grown: single weights, or a convolution's kernels (weights where there are none)."""


# ---- units ----------------------------------------------------------------------------------


def unit_size(shape: Sequence[int], kind: UnitKind) -> int:
    """Weights of a unit of a layer of this shape."""
    return math.prod(shape[2:]) if kind == "kernel" else 1


def unit_scores(tensor: Tensor, kind: UnitKind) -> Tensor:
    """Mean absolute value of each unit: of weights or of gradients.

    A mean, so that kernels of all sizes compare with one threshold.

    Args:
        tensor: [F, C, R, S] or [O, I].
        kind: ``kernel`` gives [F, C] for a convolution.
    """
    magnitudes = tensor.detach().float().abs()
    return magnitudes.mean(dim=(2, 3)) if kind == "kernel" and tensor.dim() == 4 else magnitudes


def units_of(mask: Tensor, kind: UnitKind) -> Tensor:
    """Mask of units from a mask of weights that is made of whole units."""
    return mask[:, :, 0, 0] if kind == "kernel" and mask.dim() == 4 else mask


def weights_of(units: Tensor, shape: Sequence[int]) -> Tensor:
    """Mask of weights from a mask of units."""
    extra = len(shape) - units.dim()
    return units.view(*units.shape, *[1] * extra).expand(*shape).contiguous()


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


# ---- how dense: at the beginning --------------------------------------------------------------


def uniform_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """The same density for every layer (RigL section 3, "Uniform"; DSR)."""
    return dict.fromkeys(shapes, density)


def erdos_renyi_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Erdos-Renyi-kernel: densities in proportion to (F + C + R + S) / (F C R S) (RigL section 3).

    Of a fully connected layer (O + I) / (O I). Layers for which that would be more than 1 stay dense, and
    the others share what is left, so that ``density`` of all weights live.

    Args:
        shapes: layer name -> shape of its weight.
        density: share of all weights that is to live, in (0, 1].
    """
    weights = {name: math.prod(shape) for name, shape in shapes.items()}
    scales = {name: sum(shape) / weights[name] for name, shape in shapes.items()}
    budget = density * sum(weights.values())
    dense: set[str] = set()
    while True:
        free = [name for name in shapes if name not in dense]
        left = budget - sum(weights[name] for name in dense)
        factor = left / max(sum(scales[name] * weights[name] for name in free), 1e-300)
        over = [name for name in free if factor * scales[name] > 1]
        if not over:
            return {name: 1.0 if name in dense else factor * scales[name] for name in shapes}
        top = max(scales[name] for name in over)
        dense |= {name for name in over if scales[name] == top}


def random_units(shape: Sequence[int], density: float, seed: int, layer: int) -> Tensor:
    """Units that live at the beginning, at random: bool on the CPU, at least one of them."""
    total = math.prod(shape)
    return largest(random_numbers(shape, seed, 0, layer), min(max(round(density * total), 1), total))


# ---- drop -----------------------------------------------------------------------------------


def cosine_share(done: float, first: float) -> float:
    """Share of the living units to drop: RigL's ``f_decay = alpha / 2 * (1 + cos(pi t / T_end))``.

    Args:
        done: t / T_end, in [0, 1].
        first: alpha, the share at the beginning.
    """
    return first / 2 * (1 + math.cos(math.pi * done))


def keep_largest(magnitudes: Tensor, alive: Tensor, count: int) -> Tensor:
    """Drop the smallest until ``count`` of those alive are left (RigL Algorithm 1). Bool."""
    return largest(magnitudes.masked_fill(~alive, -1.0), min(count, int(alive.sum())))


def keep_above(magnitudes: Tensor, alive: Tensor, threshold: float) -> Tensor:
    """Drop what is below the threshold (DSR Algorithm 1, "prune by threshold"); one unit stays. Bool."""
    kept = alive & (magnitudes >= threshold)
    return kept if bool(kept.any()) else keep_largest(magnitudes, alive, 1)


def adapted_threshold(threshold: float, dropped: int, target: float, tolerance: float) -> float:
    """DSR's "adjust pruning threshold": doubled if too few were dropped, halved if too many, else as it was.

    Args:
        threshold: H, that has just been used.
        dropped: K, how many weights went.
        target: N_p, how many should.
        tolerance: delta, the share of N_p that the count may be off.
    """
    if dropped < (1 - tolerance) * target:
        return 2 * threshold
    if dropped > (1 + tolerance) * target:
        return threshold / 2
    return threshold


# ---- grow -----------------------------------------------------------------------------------


def grow_random(kept: Tensor, before: Tensor, count: int, numbers: Tensor) -> Tensor:
    """Let ``count`` units grow at random free positions (DSR, SET); those just dropped come last.

    Args:
        kept: bool, units that live.
        before: bool, units that lived before the drop.
        count: how many; at most as many as are free.
        numbers: in [0, 1), the draw, of the same shape.

    Returns:
        Bool, kept and grown units.
    """
    order = numbers.to(kept.device) + (~before).double()
    return kept | largest(order.masked_fill(kept, -1.0), min(count, int((~kept).sum())))


def grow_steepest(kept: Tensor, count: int, gradients: Tensor) -> Tensor:
    """Let the ``count`` free units with the largest gradient grow (RigL Algorithm 1).

    "I_grow = ArgTopK over i not in theta without I_active": what has just been dropped may come back.

    Args:
        kept: bool, units that live.
        count: how many; at most as many as are free.
        gradients: mean absolute gradient of every unit, dead ones included.
    """
    return kept | largest(gradients.masked_fill(kept, -1.0), min(count, int((~kept).sum())))


def growth_shares(
    weights: int, survivors: Sequence[int], free: Sequence[int], sizes: Sequence[int]
) -> list[int]:
    """How many units grow in each layer: ``l_i / L * K`` weights (DSR Algorithm 1).

    Whole units, by largest remainder (ties to the first). A layer has no more than its free units; what it
    cannot take goes to the others in the same proportion.

    Args:
        weights: K, weights to grow in all layers.
        survivors: l_i, living weights per layer.
        free: dead units per layer.
        sizes: weights of a unit per layer. With units of several weights a rest smaller than a unit may stay.

    Returns:
        Units per layer.
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
