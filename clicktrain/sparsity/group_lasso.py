"""The modified group lasso of ClickTrain section 4.4, with its gradient written out.

One group is the penalized part of one kernel: what lies outside the chosen pattern, or the whole kernel when
the kernel is unimportant. The paper's two sums (over Z = W * not P and over U = W * not I) overlap in the
unimportant kernels; here each weight belongs to one group.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_norms(weight: Tensor, mask: Tensor) -> Tensor:
    """L2 norm of each kernel's weights outside ``mask``: [F, C, R, S] -> [F, C]."""
    return (weight * ~mask).square_().sum(dim=(2, 3)).sqrt_()


def lasso_penalty(weight: Tensor, mask: Tensor) -> Tensor:
    """Sum of the group norms (without the coefficient), ClickTrain section 4.4: a 0-dim tensor."""
    return group_norms(weight, mask).sum()


def add_lasso_gradient_(grad: Tensor, weight: Tensor, mask: Tensor, coefficient: float | Tensor) -> None:
    """Add the penalty's gradient, ``coefficient * z / ||z||`` per group, to ``grad`` [F, C, R, S] in place.

    At a norm of 0 the sub-gradient 0 is taken, so a group that reached zero stays. What ``mask`` keeps is not
    penalized. The paper's coefficient is 0.00025.
    """
    outside = weight * ~mask
    norms = outside.square().sum(dim=(2, 3), keepdim=True).sqrt_()
    scale = torch.where(norms > 0, coefficient / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
    grad.addcmul_(outside, scale.to(outside.dtype))


def shrink_groups_(weight: Tensor, mask: Tensor, steps_left: int) -> None:
    """One proximal step of the group lasso, sized so that the last of ``steps_left`` steps reaches zero.

    Every group's norm falls by the same amount per step: the layer's largest norm over the steps left, this
    one included. The strength is thus set by the time that remains and not by the learning rate. Not in the
    paper. Changes ``weight`` [F, C, R, S] in place, where ``mask`` is False.
    """
    outside = weight * ~mask
    norms = outside.square().sum(dim=(2, 3), keepdim=True).sqrt_()
    threshold = norms.max() / steps_left
    lost = (threshold / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp_max_(1.0)
    weight.addcmul_(outside, lost.to(outside.dtype), value=-1)
