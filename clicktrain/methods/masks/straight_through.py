"""Masks that only the forward pass sees: every weight is trained on, by the gradient of what the pass saw.

Between steps the network holds the masked weights, and the state what the mask hides. The optimizer's step
works on all of them, with their momentum and weight decay, as if no mask were there (straight-through).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clicktrain.graph.prunable import PrunableLayer, PrunableLayers
from clicktrain.methods.base import Action, ApplyMasks, RunLength, StepInfo
from clicktrain.methods.masks.masked import Masked, MaskState


@dataclass(frozen=True, kw_only=True)
class StraightThrough(Masked):
    """A method whose masks are chosen after every step, from the weights that they hid before too."""

    decay: float
    """Pull of the weights that the forward pass does not see towards zero."""
    stop: float
    """Share of the run after which masks are frozen."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Masked from the first step; masks are fixed."""
        return ("dynamic", "fixed")

    @abc.abstractmethod
    def mask_of(self, layer: PrunableLayer, scores: Tensor) -> Tensor:
        """The mask of a layer from its scores, both of the weight's shape."""

    def fixed_at(self, length: RunLength) -> int:
        """Batches after which masks are frozen."""
        return round(self.stop * length.total)

    def at_start(self, state: MaskState, prunable: PrunableLayers, length: RunLength) -> Sequence[Action]:
        """The first forward pass is masked."""
        del length
        return [self.enter(state, "dynamic", "masked from the start"), self._hide(state, prunable)]

    def _hide(self, state: MaskState, prunable: PrunableLayers) -> Action:
        """Choose the masks of the weights as they are, and keep what they hide."""
        for layer in prunable.layers:
            mask = self.mask_of(layer, self.scores(layer, state.gradients.get(layer.name)))
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
        action, end = self._hide(state, prunable), self.fixed_at(step.length)
        return self.fix(state, prunable, f"batch {end}") if step.seen >= end else [action]
