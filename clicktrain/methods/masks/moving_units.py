"""What moves in dynamic sparse training: units of layers, patterns, and how many of each layer and filter."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from clicktrain.errors import UserError
from clicktrain.formats.packed import Patterns
from clicktrain.graph.prunable import PrunableLayer, PrunableLayers
from clicktrain.methods.base import LayerPlan
from clicktrain.methods.masks.masked import Masked, MaskState
from clicktrain.methods.outcome import NOTED, Reached, Target, planned_far_off
from clicktrain.sparsity.distributions import DISTRIBUTIONS, DistributionChoice, densities_below
from clicktrain.sparsity.pattern_units import PatternUnit
from clicktrain.sparsity.patterns import FIXED_SIZES, PatternPool, all_patterns, fixed_pool
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.regrowth import units_at
from clicktrain.sparsity.units import UNITS, Unit, UnitChoice

AnyUnit = Unit | PatternUnit


@dataclass(frozen=True, kw_only=True)
class MovingUnits(Masked):
    """Settings that say what a unit is and how many live in each layer; the units themselves."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("sparsity", "compression"),)

    compression: float | None = None
    """All convolution weights / nonzero ones at the end, instead of a sparsity; linear layers stay dense."""
    granularity: UnitChoice = "weight"
    """What is dropped and grown: single weights, whole kernels, or kernels that keep a pattern of a pool
    each (1x1 kernels have one weight; kernels other than 3x3 are whole)."""
    patterns: int = 12
    """Size of the pattern pool (granularity pattern): 4, 8, 12 or 16 usual patterns, or all, which are 126
    for 4 of 9."""
    entries: int = 4
    """Kept positions of a 3x3 kernel (granularity pattern); other than 4 with all patterns only."""
    within: Literal["layer", "filter"] | None = None
    """Where units compete: in the layer, or in each filter, so that all filters of a layer keep equally many,
    as the fast kernels want it; by default filter for patterns, else layer."""
    densities: DistributionChoice = "erk"
    """Weights over layers: Erdos-Renyi-kernel (small layers denser), or the same share everywhere."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        if self.compression is not None and not 1 < self.compression < math.inf:
            raise UserError(
                f"compression must be more than 1 (8 keeps an eighth of the weights), not {self.compression}"
            )
        if self.compression is not None and self.sparsity != type(self).sparsity:
            raise UserError(
                f"compression {self.compression:g} and sparsity {self.sparsity:g} are both set: give one"
            )
        if self.granularity == "pattern":
            self.check_pool()
        elif (self.patterns, self.entries) != (MovingUnits.patterns, MovingUnits.entries):
            raise UserError(
                f"patterns and entries are of granularity pattern, not {choice_name(self.granularity)}"
            )

    # ---- units ----------------------------------------------------------------------------------

    @property
    def unit(self) -> str:
        """What has to have a meaning in a layer for it to be pruned."""
        return choice_name(self.granularity).rpartition(":")[2]

    def unit_of(self, layer: PrunableLayer) -> AnyUnit:
        """The unit of a layer: where patterns have no meaning, its kernels."""
        if self.granularity != "pattern":
            unit: AnyUnit = UNITS.resolve(self.granularity)
            return unit
        r, s = layer.view_shape[2:]
        pool = self.pool_of((r, s))
        return KERNEL if pool is None else PatternUnit(pool)

    def check_pool(self) -> None:
        """UserError if there is no pool of these settings."""
        fixed_patterns(self.patterns, self.entries)

    def pool_of(self, shape: tuple[int, int]) -> PatternPool | None:
        """The pool of kernels of a shape, None where they have no patterns."""
        pool = fixed_patterns(self.patterns, self.entries)
        return pool if shape == pool.shape else None

    def unit_at(self, state: MaskState, layer: PrunableLayer) -> AnyUnit:
        """The unit of a layer, where its pool is decided by training."""
        del state
        return self.unit_of(layer)

    def unit_refusal(self, layer: PrunableLayer) -> str | None:
        """Why the unit has no meaning in a convolution, or None."""
        if self.granularity != "pattern":
            return layer.unit_refusal(self.unit)
        return None if isinstance(self.unit_of(layer), PatternUnit) else layer.unit_refusal("kernel")

    def units_called(self, layer: PrunableLayer) -> str:
        """What the units of a layer are, in words."""
        if layer.kind == "linear":
            return "weights"
        unit = self.unit_of(layer)
        if isinstance(unit, PatternUnit):
            return f"kernels, {unit.pool.entries} of {math.prod(unit.pool.shape)}"
        return "kernels" if self.granularity == "pattern" else f"{self.unit}s"

    def rows_of(self, layer: PrunableLayer) -> int:
        """Parts of a layer in which equally many units live: its filters, or 1."""
        within = self.within or ("filter" if self.granularity == "pattern" else "layer")
        units = self.unit_of(layer).shape(layer.view_shape)
        # A unit that spans several filters has no filter of its own.
        return layer.view_shape[0] if within == "filter" and units[0] == layer.view_shape[0] else 1

    def most_of(self, layer: PrunableLayer) -> float:
        """Density of a layer in which all units live."""
        unit, view = self.unit_of(layer), layer.view_shape
        return math.prod(unit.shape(view)) * unit.size(view) / math.prod(view)

    def layer_counts(self, prunable: PrunableLayers, sparsity: float) -> dict[str, int]:
        """Units of each layer that live at a sparsity of all layers."""
        layers = {}
        for layer in prunable.layers:
            unit = self.unit_of(layer)
            units = math.prod(unit.shape(layer.view_shape))
            layers[layer.name] = units, self.rows_of(layer), unit.size(layer.view_shape)
        weights = {layer.name: math.prod(layer.shape) for layer in prunable.layers}
        return units_at(self.layer_densities(prunable, sparsity), layers, weights)

    def spread(
        self, shapes: Mapping[str, Sequence[int]], most: Mapping[str, float], density: float
    ) -> dict[str, float]:
        """Share of each layer's weights that lives at a density of all of them."""
        wanted = DISTRIBUTIONS.resolve(self.densities)(shapes, density)
        return densities_below(wanted, shapes, most)

    def layer_densities(self, prunable: PrunableLayers, sparsity: float) -> dict[str, float]:
        """Share of each layer's weights that lives at a sparsity of all layers."""
        shapes = {layer.name: layer.shape for layer in prunable.layers}
        most = {layer.name: self.most_of(layer) for layer in prunable.layers}
        return self.spread(shapes, most, 1 - sparsity)

    def mask_patterns(self, state: MaskState, layer: PrunableLayer) -> Patterns | None:
        """The patterns of the pool; whole kernels keep every position, single weights any."""
        unit = self.unit_at(state, layer)
        if isinstance(unit, PatternUnit):
            return tap_tuples(unit.pool)
        filters, channels, *kernel = layer.view_shape
        whole = tuple(unit.shape(layer.view_shape)) == (filters, channels, 1, 1)
        return (tuple(range(math.prod(kernel))),) if whole else ()

    def planned_rows(self, prunable: PrunableLayers, state: MaskState | None) -> list[LayerPlan]:
        """Per layer: the units, and the density that is planned."""
        counts, rows = self.layer_counts(prunable, self.sparsity), []
        for layer in prunable.layers:
            size = self.unit_of(layer).size(layer.view_shape)
            density = counts[layer.name] * size / math.prod(layer.shape)
            why = "dense by Erdos-Renyi" if density == 1 and not (state and state.kept) else ""
            rows.append(LayerPlan(layer.name, layer.shape, self.units_called(layer), density, None, why))
        return rows

    # ---- target ---------------------------------------------------------------------------------

    @property
    def compression_asked(self) -> float | None:
        """The compression to end at; None if it is a sparsity."""
        return self.compression

    @property
    def prunes_linear(self) -> bool:
        """Whether linear layers are pruned too; a compression is one of convolutions."""
        return self.linear and self.compression is None

    def fitted(self, prunable: PrunableLayers) -> MovingUnits:
        """These settings with the sparsity that a compression is in this network.

        Raises:
            UserError: the layers that may be pruned cannot be compressed like that.
        """
        if self.compression is None or not prunable.layers:
            return self
        total, here = prunable.conv_weights, sum(math.prod(layer.shape) for layer in prunable.counted)
        left = total / self.compression - prunable.other_conv_weights
        if left <= 0:
            raise UserError(
                f"compression {self.compression:g} cannot be met by this network: the convolutions that stay "
                f"dense alone are {total / prunable.other_conv_weights:.3g}x"
            )
        if left >= here:
            raise UserError(
                f"compression {self.compression:g} leaves all weights: ask for more than {total / here:.3g}"
            )
        done = replace(self, sparsity=1 - left / here, compression=None)
        object.__setattr__(done, "compression", self.compression)
        return done

    def check_units(self, prunable: PrunableLayers) -> None:
        """UserError where fewer units would live than there are filters, or more weights than units have."""
        units = weights = most = 0.0
        for layer in prunable.layers:
            count = math.prod(self.unit_of(layer).shape(layer.view_shape))
            units, weights = units + count, weights + math.prod(layer.shape)
            most += self.most_of(layer) * math.prod(layer.shape)
        if (1 - self.sparsity) * weights > 1.01 * most:
            asked = "" if self.compression is None else f" (compression {self.compression:g})"
            raise UserError(
                f"a sparsity of {self.sparsity:.3g}{asked} is less than patterns alone prune: "
                f"they keep {most / weights:.3g} of the weights; ask for at least {1 - most / weights:.3g}"
            )
        filters = sum(layer.view_shape[0] for layer in prunable.layers)
        living = (1 - self.sparsity) * units * weights / most
        if living < filters:
            share = math.floor(1000 * (1 - filters / units * most / weights)) / 1000
            what = "kernel" if self.granularity == "pattern" else self.unit
            raise UserError(
                f"a sparsity of {self.sparsity:g} leaves {living:.0f} "
                f"{what}s to {filters} filters: at most {share:g} can be asked of this network"
            )

    def summary(self, prunable: PrunableLayers, sparsity: float, how: str) -> str:
        """The last line of a plan: the target, and what is planned or reached."""
        if self.compression is None:
            return super().summary(prunable, sparsity, how)
        kept = (1 - sparsity) * sum(math.prod(layer.shape) for layer in prunable.counted)
        found = prunable.conv_weights / max(kept + prunable.other_conv_weights, 1)
        far_off = planned_far_off(self.compression, found)
        return f"compression asked {self.compression:g}, {how} {found:.2f}{far_off}"

    def targets_of(self, state: MaskState, reached: Reached) -> list[Target]:
        """The compression of all convolution weights, or the sparsity of the layers that are pruned."""
        if self.compression is None:
            return list(super().targets_of(state, reached))
        now = reached.conv_weights_now / max(reached.conv_nonzero, 1)
        target = Target("compression of convolution weights", self.compression, now, "times")
        far = abs(now / self.compression - 1) > NOTED
        return [replace(target, reason=self.reason if far else "")]


KERNEL = Unit((2, 3))
"""A kernel as a whole."""


@functools.lru_cache(maxsize=16)
def fixed_patterns(patterns: int, entries: int) -> PatternPool:
    """The pool of ``patterns`` usual 3x3 patterns with ``entries`` positions, or of all of them.

    Raises:
        UserError: there is no such pool.
    """
    if not 1 <= entries <= 8:
        raise UserError(f"entries is a number of positions of a 3x3 kernel, 1 to 8, not {entries}")
    every = math.comb(9, entries)
    if patterns == every:
        return PatternPool(all_patterns(entries))
    if entries == 4 and patterns in FIXED_SIZES:
        return fixed_pool(patterns)
    usual = "4, 8, 12, 16 or " if entries == 4 else ""
    raise UserError(f"patterns must be {usual}{every} (all patterns of {entries} positions), not {patterns}")


def tap_tuples(pool: PatternPool) -> Patterns:
    """Positions ``r * S + s`` of each pattern."""
    size = math.prod(pool.shape)
    return tuple(tuple(i for i in range(size) if pattern.bits >> i & 1) for pattern in pool.patterns)
