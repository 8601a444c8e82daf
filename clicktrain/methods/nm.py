"""N:M sparsity from scratch by SR-STE (Zhou et al., ICLR 2021)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayer, PrunableLayers
from clicktrain.methods.base import Action, ApplyMasks, LayerPlan, PruningPlan, RunLength, StepInfo
from clicktrain.methods.masks.masked import Masked, MaskState, leave_alone
from clicktrain.sparsity.registry import choice_name
from clicktrain.sparsity.units import best_of_each_group


@dataclass(frozen=True, kw_only=True)
class NM(Masked):
    """N of M neighboring input channels keep their weight; all weights are trained on (SR-STE, 2021).

    The forward pass sees the N largest of each group. The optimizer moves all weights by the gradient of what
    the pass saw (straight-through), with their momentum and weight decay, and a term lambda * w pulls those
    that it did not see towards zero. Between steps the network holds the masked weights, the state the rest.
    """

    name: ClassVar[str] = "nm"
    title: ClassVar[str] = "N:M (SR-STE)"
    same_everywhere: ClassVar[bool] = True

    n: int = 2
    """Weights that stay of each group."""
    m: int = 4
    """Neighboring input channels that are a group; layers whose channels it does not divide stay dense."""
    sparsity: float | None = None  # type: ignore[assignment]
    """Share of the pruned layers' weights that is zero: 1 - n / m, which need not be given."""
    decay: float = 2e-4
    """Lambda of the sparse-refined term, on the weights that the forward pass does not see."""
    stop: float = 1.0
    """Share of the run after which masks are frozen; the paper's stay open to the end."""

    def __post_init__(self) -> None:
        """Check every setting."""
        if not 1 <= self.n < self.m:
            raise UserError(f"n and m are 2 and 4 or so, 1 <= n < m, not {self.n} and {self.m}")
        given, share = self.sparsity, 1 - self.n / self.m
        if given is not None and abs(given - share) > 1e-3:
            raise UserError(
                f"sparsity is {given:g}, but {self.n}:{self.m} is {share:g}: leave it out, or choose "
                "n and m to match"
            )
        object.__setattr__(self, "sparsity", share)
        super().__post_init__()
        if not 0 <= self.decay < math.inf or not 0 < self.stop <= 1:
            raise UserError(
                "decay must not be negative, and stop is a share of the run, above 0 and at most 1"
            )

    def find_prunable(self, model: nn.Module, trained: Sequence[Tensor] | None = None) -> PrunableLayers:
        """Layers whose input channels (per group of the convolution) are divided by m."""
        prunable = super().find_prunable(model, trained)
        odd = {layer.name: layer.view_shape[1] for layer in prunable.layers if layer.view_shape[1] % self.m}
        return leave_alone(prunable, {name: f"{c} inputs are {self._odd}" for name, c in odd.items()})

    @property
    def _odd(self) -> str:
        return f"no multiple of {self.m}"

    def init(self, prunable: PrunableLayers, length: RunLength) -> MaskState:
        """Warn where n:m fits less than half of the layers that could be pruned, or of their weights."""
        odd = [math.prod(shape) for shape, why in prunable.left_alone.values() if why.endswith(self._odd)]
        fit = [layer.weight.numel() for layer in prunable.layers]
        if fit and (sum(fit) < sum(odd) or len(fit) < len(odd)):
            have = "has" if len(fit) == 1 else "have"
            warnings.warn(
                f"{len(fit)} of {len(fit) + len(odd)} layers {have} a multiple of {self.m} input channels: "
                f"the others, {sum(odd) / (sum(odd) + sum(fit)):.0%} of the weights, stay dense",
                stacklevel=4,
            )
        return super().init(prunable, length)

    @property
    def stages(self) -> tuple[str, ...]:
        """Masked from the first step; masks are fixed."""
        return ("dynamic", "fixed")

    def _fixed_at(self, length: RunLength) -> int:
        """Batches after which masks are frozen."""
        return round(self.stop * length.total)

    def at_start(self, state: MaskState, prunable: PrunableLayers, length: RunLength) -> Sequence[Action]:
        """The first forward pass is masked."""
        del length
        return [self.enter(state, "dynamic", "masked from the start"), self._hide(state, prunable)]

    def _hide(self, state: MaskState, prunable: PrunableLayers) -> Action:
        """Choose the masks of the weights as they are, and keep what they hide."""
        for layer in prunable.layers:
            mask = self._mask(layer, self.scores(layer, state.gradients.get(layer.name)))
            state.masks[layer.name] = mask
            state.hidden[layer.name] = layer.weight.detach().masked_fill(mask, 0.0)
        state.gradients = {}
        return ApplyMasks(state.masks)

    def before_step(self, state: MaskState, prunable: PrunableLayers, step: StepInfo) -> None:
        """Give the optimizer all weights back, with the pull towards zero in the gradients of the hidden."""
        if state.stage == "fixed":
            return
        if self.reads_gradient:
            self.keep_gradients(state, prunable, step)
        for layer in prunable.layers:
            hidden, grad = state.hidden.pop(layer.name), layer.weight.grad
            with torch.no_grad():
                layer.weight.add_(hidden)
            if grad is not None:
                scale = 1.0 if step.grad_scale is None else step.grad_scale.to(grad)
                grad.add_(hidden * (self.decay * scale))

    def after_step(self, state: MaskState, prunable: PrunableLayers, step: StepInfo) -> Sequence[Action]:
        """Choose the masks; after the last time for good."""
        if state.stage == "fixed":
            return ()
        action, end = self._hide(state, prunable), self._fixed_at(step.length)
        return self.fix(state, prunable, f"batch {end}") if step.seen >= end else [action]

    def _mask(self, layer: PrunableLayer, scores: Tensor) -> Tensor:
        """The n best of every m input channels, at each position of each filter."""
        return layer.unview(best_of_each_group(layer.view(scores), self.n, self.m))

    def plan(
        self, prunable: PrunableLayers, length: RunLength, state: MaskState | None = None
    ) -> PruningPlan:
        """Per layer: n of m, or what was reached."""
        what = f"{self.n} of {self.m}"
        rows = [LayerPlan(layer.name, layer.shape, what, self.n / self.m) for layer in prunable.layers]
        until = f"until batch {self._fixed_at(length)} of {length.total}"
        by = f"{what} input channels by {choice_name(self.criterion)}, chosen at every step"
        stages = [("stage 1 dynamic", f"{until}: {by}"), ("stage 2 fixed", "to the end, positions fixed")]
        return self.show(prunable, state, rows, stages)
