"""PruneTrain's group lasso over the input and output channels of layers, with its gradient written out.

Section 4.1, Eq. (2): for every layer the L2 norms of its filters and of its input channels are added up, with
one coefficient for the whole network, which Eq. (3) sets from the share that the penalty shall have of the
loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ChannelAxis:
    """One dimension of a weight, divided into channels.

    Attributes:
        dim: the dimension, 0 for a layer's filters, 1 for its input channels.
        channel: int64 [size of dim], the channel of every index; -1 = not penalized.
        count: number of channels.
    """

    dim: int
    channel: Tensor
    count: int

    def norms(self, weight: Tensor) -> Tensor:
        """L2 norm of every channel, [count]."""
        along = weight.detach().square().transpose(0, self.dim).flatten(1).sum(1)
        counted = self.channel >= 0
        total = along.new_zeros(self.count)
        return total.index_add_(0, self.channel[counted], along[counted]).sqrt_()

    def largest(self, weight: Tensor) -> Tensor:
        """Largest absolute weight of every channel, [count] (figure 4)."""
        along = weight.detach().abs().transpose(0, self.dim).flatten(1).amax(1)
        counted = self.channel >= 0
        start = along.new_zeros(self.count)
        return start.scatter_reduce_(0, self.channel[counted], along[counted], "amax")

    def first_indices(self) -> Tensor:
        """Smallest index of every channel, int64 [count]."""
        counted = self.channel >= 0
        indices = torch.arange(len(self.channel), device=self.channel.device)
        start = torch.full((self.count,), len(self.channel), device=self.channel.device)
        return start.scatter_reduce_(0, self.channel[counted], indices[counted], "amin")

    def spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """[count] -> one value for each index of the dimension, 0 where it is not penalized, to broadcast."""
        padded = torch.cat([values, values.new_zeros(1)])  # index -1 is the last one
        shape = [1] * weight.dim()
        shape[self.dim] = -1
        return padded[self.channel].view(shape)


def channel_penalty(weight: Tensor, axes: tuple[ChannelAxis, ...]) -> Tensor:
    """One layer's part of the sum in Eq. (2), without the coefficient: 0-dim."""
    return torch.stack([axis.norms(weight).sum() for axis in axes]).sum()


def add_channel_lasso_gradient_(
    grad: Tensor, weight: Tensor, axes: tuple[ChannelAxis, ...], coefficient: float | Tensor
) -> None:
    """Add the penalty's gradient, ``coefficient * w / ||channel of w||`` for each axis, to ``grad`` in place.

    At a norm of 0 the sub-gradient 0 is taken, so a channel that reached zero stays. ``grad`` and ``weight``
    are [F, C, R, S] or [O, I].
    """
    scale: Tensor | None = None
    for axis in axes:
        norms = axis.norms(weight)
        inverse = torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
        part = axis.spread(inverse, weight)
        scale = part if scale is None else scale + part
    if scale is not None:
        grad.addcmul_(weight, (scale * coefficient).to(weight.dtype))


def shrink_channels_(weight: Tensor, axes: tuple[ChannelAxis, ...], threshold: float | Tensor) -> None:
    """One proximal step of the lasso: every channel's norm falls by ``threshold``, but not below zero.

    The axes overlap, so they are treated one after the other. Not in the paper, whose sub-gradient steps let
    channels oscillate around zero by the learning rate times the coefficient. That must lie below the
    threshold of 1e-4 for anything to be removed: so it does in 182 epochs, not in a short run with a strong
    penalty.
    ``threshold``, a number or 0-dim, is the coefficient of the lasso times how far a step moves a weight per
    unit of gradient: the learning rate of SGD, or `measured_step`.
    """
    for axis in axes:
        norms = axis.norms(weight)
        lost = (threshold / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max_(1.0)
        weight.addcmul_(weight, axis.spread(lost, weight).to(weight.dtype), value=-1)


def measured_step(moved: Tensor, gradient: Tensor, coefficient: float, channels: int) -> Tensor:
    """How far a step of any optimizer moves the weights per unit of gradient: 0-dim, on their device.

    SGD moves them by the learning rate times the gradient, so the proximal step of `shrink_channels_` is the
    coefficient times the learning rate. An adaptive optimizer divides by a running size of the gradient: it
    moves every weight by about the learning rate, however small gradients are, and the lasso has to be
    measured by the same scale or it vanishes beside it. With the diagonal metric ``D`` of such a step the
    proximal step of a group has no closed form; ``D`` is replaced by its mean, ``|gradient| / |moved|``. The
    lasso's own gradient, of norm coefficient * sqrt(channels), counts as part of the gradient, as it would in
    the sum that the paper's Algorithm 1 gives to the optimizer (line 14); so all channels together never
    shrink by more than the step moved the weights. Not in the paper, which trains with SGD (section 5).

    Args:
        moved: sum of the squares of the weights' changes, 0-dim.
        gradient: sum of the squares of their gradients without the lasso's, 0-dim.
        coefficient: lambda of Eq. (2).
        channels: number of groups of the lasso.
    """
    whole = gradient + coefficient**2 * channels
    return (moved / whole.clamp_min(torch.finfo(whole.dtype).tiny)).sqrt()


def without_channels(axes: tuple[ChannelAxis, ...], indices: dict[int, list[int]]) -> tuple[ChannelAxis, ...]:
    """The same axes with some indices, dimension -> indices along it, no longer penalized."""
    remaining = []
    for axis in axes:
        channel = axis.channel.clone()
        channel[indices.get(axis.dim, [])] = -1
        remaining.append(ChannelAxis(axis.dim, channel, axis.count))
    return tuple(remaining)


def coefficient_for_ratio(ratio: float, loss: float, penalty: float) -> float:
    """Lambda such that the penalty is the given share of the whole loss: Eq. (3) solved for it.

    Args:
        ratio: lasso penalty ratio, in [0, 1); 0.2 to 0.25 in the paper.
        loss: classification loss of the first forward pass.
        penalty: sum of the norms at the same moment, without coefficient.

    Examples:
        >>> coefficient_for_ratio(0.25, 2.4, 800.0)
        0.001
    """
    return ratio / (1 - ratio) * loss / penalty if penalty > 0 else 0.0


def zero_small_channels_(weight: Tensor, axes: tuple[ChannelAxis, ...], threshold: float) -> int:
    """Set channels to zero whose weights are all under the threshold (4.1: 1e-4); the number of those."""
    zeroed = 0
    for axis in axes:
        largest = axis.largest(weight)
        small = (largest <= threshold) & (largest > 0)
        if bool(small.any()):
            zeroed += int(small.sum())
            weight.masked_fill_(axis.spread(small.to(weight.dtype), weight) > 0, 0.0)
    return zeroed
