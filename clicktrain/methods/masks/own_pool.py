"""Kernels on the patterns of a pool that a run chooses: what methods with a pool of their own share."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayer, PrunableLayers
from clicktrain.methods.masks.masked import MaskState
from clicktrain.methods.masks.moving_units import AnyUnit, MovingUnits
from clicktrain.methods.patterns.selection import PatternLayer
from clicktrain.sparsity.distributions import DistributionChoice
from clicktrain.sparsity.pattern_units import PatternUnit
from clicktrain.sparsity.patterns import MAX_POSITIONS, Pattern, PatternPool, default_entries, fixed_pool
from clicktrain.sparsity.units import UnitChoice


@dataclass(frozen=True, kw_only=True)
class OwnPool(MovingUnits):
    """A method whose patterns are those of a pool chosen in the run; it has one pool per kernel shape."""

    sparsity: float = 0.875
    """Share of the pruned layers' weights that is zero at the end, instead of a compression."""
    compression: float | None = None
    """All convolution weights / nonzero ones at the end; 8 unless a sparsity is given. Linear layers stay
    dense."""
    granularity: UnitChoice = "pattern"
    """What is pruned as one: kernels that keep a pattern each."""
    entries: int = 4
    """Kept positions of a 3x3 kernel, of which other kernel sizes keep the same share; 4 in a fixed pool."""
    pool: str = "dynamic"
    """Where the pattern pool comes from; fixed: 4, 8, 12 or 16 given 3x3 patterns."""
    patterns: int = 12
    """Size N of the pattern pool (8 or 12 in the paper)."""
    densities: DistributionChoice = "uniform"
    """Weights over layers: the same share everywhere (the paper's), or Erdos-Renyi-kernel."""

    def __post_init__(self) -> None:
        """Check every setting."""
        if self.compression is None and self.sparsity == type(self).sparsity:
            object.__setattr__(self, "compression", 8.0)
        super().__post_init__()

    @abc.abstractmethod
    def pools_of(self, state: MaskState) -> Mapping[tuple[int, int], PatternPool]:
        """The pools chosen so far."""

    @property
    def fixed(self) -> PatternPool | None:
        """The pool of 3x3 kernels where it is a given one."""
        return fixed_pool(self.patterns) if self.pool == "fixed" else None

    def check_pool(self) -> None:
        """UserError if there can be no pool of these settings."""
        if not 1 <= self.entries <= 8:
            raise UserError(f"entries is a number of positions of a 3x3 kernel, 1 to 8, not {self.entries}")
        if self.patterns < 1:
            raise UserError(f"patterns must be at least 1, not {self.patterns}")
        if self.fixed is not None and self.entries != 4:
            raise UserError(
                f"a fixed pool keeps 4 positions per kernel; entries={self.entries} needs pool=dynamic"
            )

    def pool_of(self, shape: tuple[int, int]) -> PatternPool | None:
        """A pool like the one to come: kernels of a shape keep as many positions; None: they are whole."""
        size = math.prod(shape)
        if self.pool == "fixed":
            return self.fixed if shape == (3, 3) else None
        entries = default_entries(shape, self.entries)
        if entries == size or size > MAX_POSITIONS:
            return None
        return PatternPool((Pattern((1 << entries) - 1, shape),))

    def unit_at(self, state: MaskState, layer: PrunableLayer) -> AnyUnit:
        """The unit of a layer, with the pool of its kernels as soon as there is one."""
        r, s = layer.view_shape[2:]
        unit, pool = self.unit_of(layer), self.pools_of(state).get((r, s))
        return unit if pool is None or not isinstance(unit, PatternUnit) else PatternUnit(pool)

    def pattern_layers(self, prunable: PrunableLayers) -> tuple[PatternLayer, ...]:
        """The convolutions whose kernels have patterns, as pools and votes see them."""
        units = ((layer, self.unit_of(layer)) for layer in prunable.convs)
        return tuple(
            PatternLayer(layer, unit.pool.entries, 1)
            for layer, unit in units
            if isinstance(unit, PatternUnit)
        )
