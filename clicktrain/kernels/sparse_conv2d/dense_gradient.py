"""The gradient of all weights of a packed layer, those without a value included, while it is asked for.

Where masks move, units grow by it, once in many steps: only for these steps it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.formats.packed import Structure, pack_values

_SAME_SCALE = 0.02
"""Sums in another order, or in bfloat16, differ by less; a scale that was divided out by more."""


class DenseGradient:
    """Sum of the gradients w.r.t. a packed layer's dense weight over the batches of one optimizer step."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._task = -1
        self._whole = self._settled = False

    def add(self, gradient: Tensor, so_far: Tensor | None) -> None:
        """Add what one use of the layer contributes to a backward pass.

        ``so_far``: the gradient of the layer's values from earlier backward passes. Where there is none, this
        one begins the sum; where there is, and this holds nothing, the sum stays incomplete.
        """
        task = torch._C._current_graph_task_id()
        if task != self._task and (so_far is None or not bool(so_far.any())):
            self._sum, self._whole = None, True
        self._task, self._settled = task, False
        gradient = gradient.detach()
        self._sum = gradient.clone() if self._sum is None else self._sum.add_(gradient)

    def settle(
        self, structure: Structure, values_grad: Tensor | None, mean_: Callable[[Tensor], Tensor]
    ) -> None:
        """Bring the sum to the scale of the gradient that the optimizer is given for the values.

        That one has been averaged over processes, which ``mean_`` does here in place, and whatever has
        divided a mixed-precision scale out of it, or clipped it, did not know of this one.
        """
        if self._sum is None or not self._whole or self._settled or values_grad is None:
            return
        self._sum = mean_(self._sum.to(values_grad.dtype))
        own = pack_values(structure, self._sum)
        square = float((own * own).sum(dtype=torch.float64))
        factor = float((own * values_grad).sum(dtype=torch.float64)) / square if square > 0 else 1.0
        if abs(factor - 1) > _SAME_SCALE and math.isfinite(factor):
            self._sum.mul_(factor)
        self._settled = True

    @property
    def value(self) -> Tensor | None:
        """The gradient in the dense weight's shape; None unless it holds every batch of the step."""
        return self._sum if self._whole else None


def convolution_weight_gradient(
    x: Tensor,
    gy: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Gradient w.r.t. a dense weight [F, C, R, S] from inputs [N, groups*C, H, W] and output gradients.

    Numbers of both may be of any dtype, the same one; so are those of the result.
    """
    if isinstance(padding, str):
        reach = [(shape[2 + i] - 1) * dilation[i] if padding == "same" else 0 for i in (0, 1)]
        before = [one // 2 for one in reach]
        x = F.pad(x, (before[1], reach[1] - before[1], before[0], reach[0] - before[0]))
        padding = (0, 0)
    like = x.new_empty(1).expand(*shape)
    _, gradient, _ = torch.ops.aten.convolution_backward(
        gy, x, like, None, list(stride), list(padding), list(dilation), False, [0, 0], groups,
        [False, True, False],
    )  # fmt: skip
    return gradient  # type: ignore[no-any-return]
