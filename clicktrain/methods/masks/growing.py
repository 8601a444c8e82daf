"""Units that also grow: first masks, and the two promises of every move, as many units and no dead filter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clicktrain.comm.agreement import agree_on_, agreed_text
from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayer, PrunableLayers
from clicktrain.methods.base import RunLength
from clicktrain.methods.masks.masked import MaskState, Tensors
from clicktrain.methods.masks.moving import Moving
from clicktrain.sparsity.importance import reads_gradient
from clicktrain.sparsity.living_filters import (
    constant_filters,
    outstanding_units,
    random_units,
    with_living_filters,
)
from clicktrain.sparsity.pattern_units import PatternUnit
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.regrowth import GROWTHS, GrowthChoice, Units, Update, random_numbers


@dataclass(frozen=True, kw_only=True)
class Growing(Moving):
    """A method whose units also grow, most often sparse from the first step, at random positions."""

    growth: GrowthChoice = "gradient"
    """Where units grow inside a layer: at the largest gradients, or at random positions."""
    mask_seed: int | None = None
    """Seed of the random positions; the run's own by default."""

    def __post_init__(self) -> None:
        """Check every setting."""
        super().__post_init__()
        if self.mask_seed is not None and self.mask_seed < 0:
            raise UserError(f"mask_seed must be at least 0, not {self.mask_seed}")

    @property
    def first_sparsity(self) -> float:
        """Sparse from the first step."""
        return self.sparsity

    @property
    def needs_gradients(self) -> bool:
        """Whether an update reads gradients."""
        return super().needs_gradients or self.grows_by_gradient

    @property
    def grows_by_gradient(self) -> bool:
        """Whether what grows is chosen by gradients; else at random."""
        return reads_gradient(GROWTHS.resolve(self.growth))

    def grow(self, now: Update, kept: Units, counts: Mapping[str, int]) -> Units:
        """The units that live once these counts have grown in each layer; no filter of zeros only."""
        if not any(counts.values()):
            return kept
        alive = GROWTHS.resolve(self.growth)(now, kept, counts)
        return {name: self._with_filters(now, name, kept[name], units) for name, units in alive.items()}

    def _with_filters(self, now: Update, name: str, kept: Tensor, alive: Tensor) -> Tensor:
        """The same number of units, with one that is not zero in every filter that had one."""
        scores = now.scores[name]
        if now.rows_of(name) > 1 or scores.shape[0] == 1:
            return alive  # every row keeps its best; or units have no filter of their own
        had = scores.masked_fill(~now.alive[name], 0.0)
        gradient = now.gradients.get(name, scores.new_zeros(()))
        result = with_living_filters(alive, had, torch.where(kept, 1 + had, gradient / (1 + gradient)))
        known = f"constant filters of {name}"
        if known not in now.memory and (count := int(constant_filters(result, had).sum())):
            now.memory[known] = count  # warned of once, also by a run that is resumed
            warnings.warn(
                f"{count} of {len(result)} filters of {name} lose their last nonzero weight and compute a "
                "constant: too few units are left in the layer",
                stacklevel=2,
            )
        return result

    @property
    def grown(self) -> str:
        """Where units grow, in words."""
        name = choice_name(self.growth)
        return {"gradient": "the largest gradients", "random": "random positions"}.get(name, name)

    def init(self, prunable: PrunableLayers, length: RunLength) -> MaskState:
        """Random positions, from the seed or else from PyTorch's (which is only read); none if dense."""
        state = super().init(prunable, length)
        seed = torch.initial_seed() if self.mask_seed is None else self.mask_seed
        state.seed = int(agreed_text(str(seed), prunable.layers[0].weight.device))
        if self.first_sparsity == 0:
            return state
        state.stage = self.moves_in
        counts = self.layer_counts(prunable, self.first_sparsity)
        for number, layer in enumerate(prunable.layers):
            state.masks[layer.name] = self._first_mask(layer, counts[layer.name], state.seed, number)
        agree_on_([state.masks[name] for name in sorted(state.masks)])
        self._warn_of_constants(prunable, state.masks)
        return state

    def _first_mask(self, layer: PrunableLayer, count: int, seed: int, number: int) -> Tensor:
        """Random units, those first that dominate a filter's initial weights; of no filter only zeros."""
        unit, view, rows = self.unit_of(layer), layer.view_shape, self.rows_of(layer)
        squares = layer.view(layer.weight.detach()).float().square()
        energies = unit.scores(squares)
        filters = energies.shape[0] == view[0]
        first = outstanding_units(energies) if filters else None
        units = random_units(unit.shape(view), count, seed, number, rows, first).to(squares.device)
        if filters:
            order = random_numbers(units.shape, seed, 0, number)
            units = with_living_filters(units, energies, order, rows)
        if not isinstance(unit, PatternUnit):
            return layer.unview(unit.weights(units, view))
        # A random pattern, which holds what dominates the filter, and no zeros where there is something else.
        numbers = random_numbers(view, seed, 1, number).to(squares)
        worth = numbers + (squares > 0) + math.prod(view[2:]) * outstanding_units(squares)
        return layer.unview(unit.first(units, worth))

    def _warn_of_constants(self, prunable: PrunableLayers, masks: Tensors) -> None:
        """Warn of filters that the first masks leave without a nonzero weight."""
        bare = []
        for layer in prunable.layers:
            weights, mask = layer.view(layer.weight.detach()).abs(), layer.view(masks[layer.name])
            if count := int(constant_filters(mask, weights).sum()):
                bare.append(f"{count} of {len(mask)} of {layer.name}")
        if bare:
            warnings.warn(
                f"filters without a nonzero weight at the start, which compute constants: {', '.join(bare)}; "
                "a lower sparsity, or densities erk, leaves more to small layers",
                stacklevel=2,
            )
