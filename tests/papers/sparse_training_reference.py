"""One update of GMP, GraNet and MEST, and one step of SR-STE, in plain loops written from the papers.

Nothing of the library is used. A layer is a list of weights; ``alive`` says which of them live.
"""

from __future__ import annotations

import math


def cubic_sparsity(step: int, begin: int, end: int, first: float, final: float) -> float:
    """Zhu and Gupta (2017), Eq. (1), and GraNet's Eq. (2), which is the same."""
    if step >= end:
        return final
    left = 1 - (step - begin) / (end - begin)
    return final + (first - final) * left * left * left


def by_score(scores: list[float], among: list[int]) -> list[int]:
    """Best first; of equal ones the first."""
    return sorted(among, key=lambda i: (-scores[i], i))


def gmp_update(weights: list[float], alive: list[bool], sparsity: float) -> list[bool]:
    """Zhu and Gupta: weights are sorted by magnitude and the smallest masked until the sparsity is met."""
    keep = max(round((1 - sparsity) * len(weights)), 1)
    order = by_score([abs(w) for w in weights], [i for i in range(len(weights)) if alive[i]])
    return [i in order[:keep] for i in range(len(weights))]


def granet_update(
    layers: list[list[float]],
    gradients: list[list[float]],
    alive: list[list[bool]],
    sparsity: float,
    replaced: float,
) -> list[list[bool]]:
    """Liu et al., Algorithm 1: prune the whole network, then drop and regenerate as many in each layer."""
    flat = [(layer, i) for layer, own in enumerate(alive) for i in range(len(own)) if own[i]]
    total = sum(len(own) for own in alive)
    best = []
    for layer, own in enumerate(alive):  # no layer is lost
        living = [i for i in range(len(own)) if own[i]]
        best.append((layer, by_score([abs(w) for w in layers[layer]], living)[0]))
    flat.sort(key=lambda at: (at not in best, -abs(layers[at[0]][at[1]]), at))
    kept = set(flat[: max(min(round((1 - sparsity) * total), len(flat)), len(alive))])
    result = []
    for layer, weights in enumerate(layers):
        living = [i for i in range(len(weights)) if (layer, i) in kept]
        count = max(len(living) - math.floor(replaced * len(living)), 1)
        stay = by_score([abs(w) for w in weights], living)[:count]
        free = [i for i in range(len(weights)) if i not in stay]
        grown = by_score([abs(g) for g in gradients[layer]], free)[: len(living) - count]
        result.append([i in stay or i in grown for i in range(len(weights))])
    return result


def cosine(step: int, end: int) -> float:
    return (1 + math.cos(math.pi * step / end)) / 2


def mest_remove(
    weights: list[float], gradients: list[float], alive: list[bool], keep: int, gradient_weight: float
) -> list[bool]:
    """Yuan et al.: ArgRemoveTo, by |w| + lambda |g|."""
    scores = [abs(w) + gradient_weight * abs(g) for w, g in zip(weights, gradients, strict=True)]
    order = by_score(scores, [i for i in range(len(weights)) if alive[i]])
    return [i in order[:keep] for i in range(len(weights))]


def mest_counts(size: int, sparsity: float, share: float, soft_bound: bool) -> tuple[int, int]:
    """How many weights of a layer stay, and how many live afterwards.

    EM removes to s + p and grows to s; EM&S removes to s and grows to s - p.
    """
    first = sparsity if soft_bound else sparsity + share
    then = sparsity - share if soft_bound else sparsity
    return max(round((1 - first) * size), 1), round((1 - then) * size)


def nm_mask(weights: list[list[float]], n: int, m: int) -> list[list[bool]]:
    """Zhou et al.: of every m neighbors of a row the n with the largest magnitudes."""
    mask = []
    for row in weights:
        kept = []
        for begin in range(0, len(row), m):
            kept += by_score([abs(w) for w in row], list(range(begin, begin + m)))[:n]
        mask.append([i in kept for i in range(len(row))])
    return mask


def sr_ste_step(
    weights: list[list[float]],
    momentum: list[list[float]],
    gradients: list[list[float]],
    mask: list[list[bool]],
    settings: tuple[float, float, float, float],
) -> None:
    """Eq. (9) with SGD: ``w -= lr * (m := beta m + g(masked w) + lambda (not mask) w + wd w)``, in place.

    Args:
        weights: dense.
        momentum: buffers.
        gradients: of the loss at the masked weights.
        mask: of the forward pass.
        settings: learning rate, beta, weight decay, lambda.
    """
    rate, beta, decay, pull = settings
    for r, row in enumerate(weights):
        for i in range(len(row)):
            g = gradients[r][i] + (0.0 if mask[r][i] else pull * row[i])
            momentum[r][i] = beta * momentum[r][i] + g + decay * row[i]
            row[i] -= rate * momentum[r][i]
