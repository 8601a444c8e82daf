"""Straight-through masks: the forward pass sees masked weights, the optimizer moves all of them (SR-STE)."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clicktrain.graph.prunable import PrunableLayer, PrunableLayers
from clicktrain.methods.base import Action, ApplyMasks, RunLength, StepInfo
from clicktrain.methods.masks.masked import Masked, MaskState


@dataclass(frozen=True, kw_only=True)
class StraightThrough(Masked):
    """Masks chosen again at every step; what they hide is kept in the state (Zhou et al., Eq. (8), (9))."""

    same_everywhere: ClassVar[bool] = True

    decay: float = 2e-4
    """Lambda of the sparse-refined term, on the weights that the forward pass does not see."""
    stop: float = 1.0
    """Share of the run after which masks are frozen; the paper's stay open to the end."""

    @abc.abstractmethod
    def choose(self, layer: PrunableLayer, scores: Tensor) -> Tensor:
        """The mask of a layer, of its weight's shape."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Masked from the first step; masks are fixed."""
        return ("dynamic", "fixed")

    def frozen_at(self, length: RunLength) -> int:
        """Batches after which masks are frozen."""
        return round(self.stop * length.total)

    def cut_epoch(self, state: MaskState, length: RunLength, *, latest: bool = False) -> float | None:
        """When masks are not chosen again."""
        del state, latest
        return self.frozen_at(length) / length.steps_per_epoch

    def at_start(self, state: MaskState, prunable: PrunableLayers, length: RunLength) -> Sequence[Action]:
        """The first forward pass is masked."""
        del length
        return [self.enter(state, "dynamic", "masked from the start"), self._hide(state, prunable)]

    def _hide(self, state: MaskState, prunable: PrunableLayers) -> Action:
        """Choose the masks of the weights as they are, and keep what they hide."""
        for layer in prunable.layers:
            mask = self.choose(layer, self.scores(layer, state.gradients.get(layer.name)))
            state.masks[layer.name] = mask
            state.hidden[layer.name] = layer.weight.detach().masked_fill(mask, 0.0)
        state.gradients = {}
        return ApplyMasks(state.masks)

    def wants_gradients(self, state: MaskState, length: RunLength, seen: int) -> bool:
        """Until masks are frozen: the optimizer moves hidden weights by the gradients of all."""
        del length, seen
        return state.stage != "fixed"

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
        action, end = self._hide(state, prunable), self.frozen_at(step.length)
        return self.fix(state, prunable, f"batch {end}") if step.seen >= end else [action]
