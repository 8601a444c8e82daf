"""Batch norm whose statistics are those of the whole batch, which several processes share.

PyTorch's ``nn.SyncBatchNorm`` takes tensors on GPUs only; this one sends sums over any process group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clicktrain.comm.agreement import sum_over_processes
from clicktrain.comm.collectives import NORMS

_OTHER_THAN_IMAGES = (0, 2, 3)


_TOGETHER = False
"""Whether all processes run their networks at this moment."""
_GROUP: dist.ProcessGroup | None = None
"""Those that share statistics; None: all of them."""


@contextlib.contextmanager
def run_together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """All processes run a forward pass in the block: elsewhere no norm waits for another process.

    Networks are run for other reasons too, by one process or by each for itself: to trace or to time them.

    Args:
        group: the processes that share statistics with this one; all of them by default.
    """
    global _TOGETHER, _GROUP
    before = _TOGETHER, _GROUP
    _TOGETHER, _GROUP = True, group
    try:
        yield
    finally:
        _TOGETHER, _GROUP = before


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over several processes in training, where they run together; else it is the same.

    Two sums travel on the way forward, first that of values, then that of squares about the mean, and one
    on the way back. Processes may have different numbers of images.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize [N, C, H, W]."""
        if not self.training or not _TOGETHER:
            return super().forward(input)
        self._check_input_dim(input)
        output, mean, variance, count = cast(
            "tuple[Tensor, Tensor, Tensor, Tensor]",
            _Normalize.apply(input, self.weight, self.bias, self.eps, _GROUP),  # type: ignore[no-untyped-call]
        )
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self._follow(self.running_mean, self.running_var, mean, variance, float(count))
        return output

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, now: Tensor, spread: Tensor, count: float) -> None:
        """One step of the running statistics; the variance that is kept is the unbiased one, as PyTorch's."""
        factor = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if factor is None:
                factor = 1.0 / float(self.num_batches_tracked)
        mean.lerp_(now.to(mean.dtype), factor or 0.0)
        variance.lerp_((spread * (count / max(count - 1, 1))).to(variance.dtype), factor or 0.0)


class _Normalize(torch.autograd.Function):
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` with mean and variance of several processes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the output and, for running statistics, mean [C], variance [C] and number of values."""
        values = _wide(x)
        own = torch.tensor([x.numel() // x.shape[1]], dtype=values.dtype, device=x.device)
        sums = sum_over_processes(torch.cat((values.sum(_OTHER_THAN_IMAGES), own)), NORMS, group)
        count = sums[-1]
        mean = sums[:-1] / count
        centered = values - mean.view(1, -1, 1, 1)
        variance = sum_over_processes(centered.square().sum(_OTHER_THAN_IMAGES), NORMS, group) / count
        scale = (variance + eps).rsqrt()
        normal = centered.mul_(scale.view(1, -1, 1, 1))
        output = normal if weight is None else normal * _wide(weight).view(1, -1, 1, 1)
        if bias is not None:
            output = output + _wide(bias).view(1, -1, 1, 1)
        ctx.save_for_backward(normal, weight, scale, count)
        ctx.has_bias, ctx.group = bias is not None, group
        ctx.mark_non_differentiable(mean, variance, count)
        return output.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and, of this process's images alone, of weight and bias: DDP takes their mean."""
        normal, weight, scale, count = ctx.saved_tensors
        grad = _wide(gradients[0])
        total, product = grad.sum(_OTHER_THAN_IMAGES), (grad * normal).sum(_OTHER_THAN_IMAGES)
        grad_weight = None if weight is None else product.to(weight.dtype)
        grad_bias = total.to(scale.dtype) if ctx.has_bias else None
        sums = sum_over_processes(torch.stack((total, product)), NORMS, ctx.group) / count
        factor = scale if weight is None else scale * _wide(weight)
        middle, slope = (row.view(1, -1, 1, 1) for row in sums)
        grad_x = (grad - middle - normal * slope) * factor.view(1, -1, 1, 1)
        return grad_x.to(gradients[0].dtype), grad_weight, grad_bias, None, None


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


SYNCHRONIZED = (nn.SyncBatchNorm, SyncBatchNorm2d)
"""Batch norms whose statistics are those of several processes."""


def synchronized(model: nn.Module, whole: bool = True) -> nn.Module:
    """The model with 2-D batch norms that share statistics over processes; names and tensors stay.

    ``whole``: over all of them, which PyTorch's does on GPUs, not over the group of `run_together`.
    """
    if whole and any(tensor.is_cuda for tensor in model.parameters()):
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
        return cast("nn.Module", convert(model))  # type: ignore[no-untyped-call]
    for module in list(model.modules()):
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model
