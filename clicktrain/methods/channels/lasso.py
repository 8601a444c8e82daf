"""The group lasso over channels in a training loop (PruneTrain 4.1): its coefficient, and how it acts.

The paper trains with SGD; with any other optimizer the shrinkage is scaled by how far its steps move the
weights (`clicktrain.sparsity.channel_lasso.measured_step`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.graph.prunable import PrunableLayers
from clicktrain.methods.contract import StepInfo
from clicktrain.sparsity.channel_lasso import (
    ChannelAxis,
    add_channel_lasso_gradient_,
    channel_penalty,
    coefficient_for_ratio,
    measured_step,
    shrink_channels_,
)
from clicktrain.surgery import dependencies

Axes: TypeAlias = dict[str, tuple[ChannelAxis, ...]]
"""Layer -> the channels along the dimensions of its weight."""


def channel_axes(model: nn.Module, example: Any, layers: Collection[str]) -> Axes:
    """The removable channels of layers, by the network's own dependencies (PruneTrain 4.1).

    Left out are channels that have to stay: those of the image in the first layer, the classes of the last,
    and channels that an operation in between fixes. Indices that can only be removed together are one
    channel: the pixels of a channel after a flatten, the same input channel of every group of a grouped
    convolution.

    Returns:
        Layer name -> those of its dimensions 0 and 1 that have removable channels.

    Raises:
        UserError: torch.fx cannot trace the model, or no channel can be removed.
    """
    weights = {f"{name}.weight": name for name in layers}
    numbers: dict[tuple[str, int], Tensor] = {}
    """Layer and dimension -> the channel of each index, -1 where it has to stay."""
    counts: Counter[tuple[str, int]] = Counter()
    groups = dependencies(model, example).groups
    for group in groups:
        for member in group.members if group.fixed is None else ():
            if member.name not in weights:
                continue
            weight, key = model.get_parameter(member.name), (weights[member.name], member.dim)
            if (
                member.dim == 1
                and weight.shape[1] == 1
                and getattr(model.get_submodule(key[0]), "groups", 1) > 1
            ):
                continue  # depthwise: the filters are the channels that it reads
            unknown = torch.full((weight.shape[member.dim],), -1, dtype=torch.int64)
            channel = numbers.setdefault(key, unknown)
            for indices in member.indices:
                channel[list(indices)] = counts[key]
                counts[key] += 1
    axes: Axes = {}
    for name in layers:
        device = model.get_parameter(f"{name}.weight").device
        own = [(dim, numbers[name, dim].to(device)) for dim in (0, 1) if (name, dim) in numbers]
        if own:
            axes[name] = tuple(ChannelAxis(dim, channel, counts[name, dim]) for dim, channel in own)
    if not axes:
        fixed = [group for group in groups if group.fixed and group.members][:3]
        why = "; ".join(f"{group.members[0].name}:{group.members[0].dim}: {group.fixed}" for group in fixed)
        raise UserError(f"no channel of this network can be removed ({why or 'it has no layers'})")
    return axes


@dataclass(slots=True)
class LassoState:
    """State of the lasso between steps. Only the coefficient is saved.

    Attributes:
        coefficient: None before the first step.
        axes: channels that can be removed, None until the network is known.
        penalized: the same without the channels that are held.
        before: inside a step of an adaptive optimizer, the weights and the sum of their squared gradients.
    """

    coefficient: float | None = None
    axes: Axes | None = field(default=None, compare=False)
    penalized: Axes = field(default_factory=dict, compare=False)
    before: tuple[list[Tensor], Tensor] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class ChannelLasso:
    """A group lasso over channels: proximal (shrink after each step) or by its gradient (the paper's).

    ``coefficient`` is fixed, or chosen at the first step: the penalty is then ``penalty_ratio`` of the loss.
    """

    update: Literal["proximal", "gradient"]
    penalty_ratio: float
    coefficient: float | None = None

    def start(self, state: LassoState, prunable: PrunableLayers, loss: Tensor) -> None:
        """Choose the coefficient at the first step: Eq. (3)."""
        if state.coefficient is None:
            weights = weights_of(prunable, state.axes or {})
            penalty = float(torch.stack([channel_penalty(w.float(), a) for w, a in weights]).sum())
            state.coefficient = self.coefficient or coefficient_for_ratio(
                self.penalty_ratio, float(loss), penalty
            )

    def before_step(self, state: LassoState, prunable: PrunableLayers, step: StepInfo, steered: bool) -> None:
        """Add the lasso's gradient, or note what `after_step` needs.

        ``steered``: the coefficient follows a target, which makes up for what an adaptive optimizer does.
        """
        assert state.coefficient is not None
        weights = weights_of(prunable, state.penalized)
        if self.update == "proximal":
            if step.adaptive and not steered:
                gradients = [step.gradient(weight) for weight, _ in weights]
                square = sum_of_squares([g for g in gradients if g is not None] or [step.loss.new_zeros(1)])
                state.before = [weight.detach().clone() for weight, _ in weights], square
            return
        strength: float | Tensor = state.coefficient
        if step.grad_scale is not None:
            strength = step.grad_scale * strength
        for weight, axes in weights:
            if weight.grad is not None:
                add_channel_lasso_gradient_(weight.grad, weight.detach(), axes, strength)

    def after_step(self, state: LassoState, prunable: PrunableLayers, step: StepInfo, steered: bool) -> None:
        """The proximal step; of an adaptive optimizer by how far its step moved the weights."""
        if self.update != "proximal" or state.coefficient is None:
            return
        weights, reach = weights_of(prunable, state.penalized), torch.tensor(step.learning_rate)
        before, state.before = state.before, None
        if step.adaptive and not steered:
            if before is None:
                return  # a step that was skipped for overflow
            # What layers of other learning rates moved counts as if they had the same.
            moves = [
                (weight - old) / (step.relative_rate(weight) or 1.0)
                for (weight, _), old in zip(weights, before[0], strict=True)
            ]
            moved = sum_of_squares(moves)
            channels = sum(axis.count for _, axes in weights for axis in axes)
            reach = measured_step(moved, before[1], state.coefficient, channels)
        for weight, axes in weights:
            own = reach.to(weight.device) * step.relative_rate(weight)
            shrink_channels_(weight, axes, state.coefficient * own)

    def describe(self) -> str:
        """Its strength and update, in a clause."""
        strength = f"{self.penalty_ratio:g} of the whole loss at the first step"
        if self.coefficient is not None:
            strength = f"coefficient {self.coefficient:g}"
        return f"over input and output channels, {strength}, {self.update}"


def weights_of(prunable: PrunableLayers, axes: Axes) -> list[tuple[Tensor, tuple[ChannelAxis, ...]]]:
    """The weights of the layers that have axes, with these."""
    return [(layer.weight, axes[layer.name]) for layer in prunable.layers if layer.name in axes]


@torch.no_grad()
def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum over all elements of all tensors, 0-dim float32."""
    return torch.stack([tensor.detach().float().square().sum() for tensor in tensors]).sum()
