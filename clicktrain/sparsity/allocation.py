"""Allocation: how many kernels each layer keeps, so that the network meets one compression ratio.

Every filter of a layer keeps the same number of kernels (ClickTrain section 5.2), so the unit that is bought
is "one more kernel in every filter of the layer", at a price of F * entries weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clicktrain.errors import UserError


@dataclass(frozen=True, slots=True)
class LayerBudget:
    """What allocation has to know of a layer.

    ``kernels`` is C, the kernels per filter; ``entries`` the weights kept in a kernel; ``positions`` R*S.
    ``fixed`` pins the number of kept kernels (a per-layer override).
    """

    name: str
    filters: int
    kernels: int
    entries: int
    positions: int
    fixed: int | None = None

    @property
    def price(self) -> int:
        """Weights that one more kernel per filter costs."""
        return self.filters * self.entries

    @property
    def weights(self) -> int:
        """All weights of the layer."""
        return self.filters * self.kernels * self.positions

    def kernels_for_density(self, density: float) -> int:
        """Kept kernels per filter that come closest to a weight density, at least 1."""
        return max(1, min(self.kernels, round(density * self.positions * self.kernels / self.entries)))


def compression_limits(layers: Sequence[LayerBudget], other_weights: int) -> tuple[float, float]:
    """Smallest and largest compression of these layers; ``other_weights`` of convolutions stay dense."""
    total = sum(layer.weights for layer in layers) + other_weights
    most = sum(layer.price * (layer.fixed or layer.kernels) for layer in layers) + other_weights
    least = sum(layer.price * (layer.fixed or 1) for layer in layers) + other_weights
    return (total / most, total / least) if most else (1.0, 1.0)


def check_reachable(layers: Sequence[LayerBudget], other_weights: int, compression: float) -> None:
    """Raise a UserError that names the reachable range if ``compression`` is outside it."""
    low, high = compression_limits(layers, other_weights)
    if not low * 0.99 <= compression <= high * 1.01:
        side = (
            "keep more positions per kernel (entries) or exclude layers to go lower"
            if compression < low
            else "a wider network, fewer excluded layers or fewer entries per kernel go higher"
        )
        raise UserError(
            f"compression {compression:g} cannot be met by this network: its convolutions can be compressed "
            f"{low:.2f}x to {high:.2f}x with one kernel per filter at the least ({side})"
        )


def allocate(
    layers: Sequence[LayerBudget],
    other_weights: int,
    compression: float,
    gains: Mapping[str, Tensor] | None = None,
    *,
    floor: float = 0.0,
) -> dict[str, int]:
    """Kept kernels per filter of every layer, for one compression ratio over all convolution weights.

    Args:
        layers: the layers that are pruned.
        other_weights: convolution weights that stay dense; they count in the ratio.
        compression: all convolution weights / nonzero convolution weights.
        gains: per layer [C], the worth of buying the 1st, 2nd, ... kernel of every filter; falling. The best
            worth per weight is bought first. Without gains every layer gets the same weight density.
        floor: every layer keeps at least this share of the density that equal densities would give it.

    Raises:
        UserError: the ratio cannot be reached by these layers.
    """
    check_reachable(layers, other_weights, compression)
    total = sum(layer.weights for layer in layers) + other_weights
    budget = round(total / compression) - other_weights
    kept = {layer.name: layer.fixed or 1 for layer in layers}
    free = [layer for layer in layers if layer.fixed is None]
    if gains is not None and floor > 0:
        even = _buy(free, dict(kept), budget - _cost(layers, kept), None)
        kept.update({layer.name: max(1, math.floor(floor * even[layer.name])) for layer in free})
    return _buy(free, kept, budget - _cost(layers, kept), gains)


def _cost(layers: Sequence[LayerBudget], kept: Mapping[str, int]) -> int:
    return sum(layer.price * kept[layer.name] for layer in layers)


def _buy(
    layers: Sequence[LayerBudget], kept: dict[str, int], budget: int, gains: Mapping[str, Tensor] | None
) -> dict[str, int]:
    """Spend ``budget`` weights on further kernels, best offer first; what no longer fits is passed over."""
    offers: list[tuple[float, int, int]] = []  # (worth, layer, k): k is the k-th kernel, counted from 1
    for index, layer in enumerate(layers):
        ks = range(kept[layer.name] + 1, layer.kernels + 1)
        if gains is None:
            # The density at which rounding would grant the k-th kernel: equal densities for all layers.
            offers += [(-(k - 0.5) * layer.entries / (layer.kernels * layer.positions), index, k) for k in ks]
        else:
            worth = (gains[layer.name].double() / layer.price).tolist()
            offers += [(worth[k - 1], index, k) for k in ks]
    offers.sort(key=lambda offer: (-offer[0], offer[1], offer[2]))
    for _, index, k in offers:
        layer = layers[index]
        if kept[layer.name] == k - 1 and layer.price <= budget:
            kept[layer.name] = k
            budget -= layer.price
    return kept


def kernel_gains(scores: Tensor, *, normalize: bool = False) -> Tensor:
    """Worth of the 1st, 2nd, ... kept kernel per filter: [F, C] -> [C], falling.

    The k-th entry is the sum over filters of their k-th highest score. With ``normalize`` the layer's scores
    are first divided by their mean, so that layers compete by the shape of their distribution and not by
    their scale (which batch norm makes meaningless for magnitudes).
    """
    scores = scores.double()
    if normalize:
        scores = scores / scores.mean().clamp_min(torch.finfo(torch.float64).tiny)
    return scores.sort(dim=1, descending=True).values.sum(dim=0)
