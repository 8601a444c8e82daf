"""A communication hook for DistributedDataParallel by which only gradients of kept weights travel.

ClickTrain section 5.3: pruned weights stay zero, so their gradients need not be sent. Where weights are
packed they do not exist; this is for weights that are masked and dense. All processes have the same masks,
and each derives the kept positions from them: no index is ever sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from clicktrain.comm.collectives import GRADIENTS, GROWTH, all_reduce_, note
from clicktrain.errors import UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket


class ExchangedMasks(NamedTuple):
    """What the coming optimizer step uses of the gradients of masked dense weights.

    Attributes:
        masks: parameter -> bool of its shape, True = kept; the same objects as long as no mask changes.
        all_used: gradients outside the masks are used too.
    """

    masks: Mapping[Tensor, Tensor]
    all_used: bool = False


class KnowsMasks(Protocol):
    """What `KeptExchange` asks, during every backward pass; a `clicktrain.Pruner` is one."""

    def exchanged_masks(self) -> ExchangedMasks:
        """The masks of dense weights, and what the step that this backward pass is for uses."""


class KeptExchange:
    """State of `masked_allreduce_hook`: whose masks, and which positions of each bucket they keep.

    Args:
        pruner: what ``attach`` returned; masks are read from it in every backward pass.
        group: the process group that gradients are averaged over; by default all processes.
        dense: send every gradient all the same.
        dtype: what gradients are rounded to while they travel, as PyTorch's compressing wrappers do it, but
            after kept positions are gathered; by default nothing is rounded.

    Raises:
        UserError: ``pruner`` has no masks to ask for.
    """

    __slots__ = ("_buckets", "_pruner", "dense", "dtype", "group")

    def __init__(
        self,
        pruner: KnowsMasks,
        group: Any = None,
        *,
        dense: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not hasattr(pruner, "exchanged_masks"):
            raise UserError(
                f"KeptExchange takes the pruner that attach returned, not a {type(pruner).__name__}"
            )
        self._pruner, self.group, self.dense, self.dtype = pruner, group, dense, dtype
        self._buckets: dict[int, _Bucket] = {}

    def masks(self) -> ExchangedMasks:
        """What the coming step uses; no mask counts where everything is sent."""
        return ExchangedMasks({}) if self.dense else self._pruner.exchanged_masks()

    def kept(self, number: int, parameters: list[Tensor], masks: Mapping[Tensor, Tensor]) -> Tensor | None:
        """Ascending int64 positions of kept weights in a bucket; None where no parameter of it is masked.

        They are derived again only where the bucket has got other parameters, or these other masks.
        """
        own = [masks.get(parameter) for parameter in parameters]
        bucket = self._buckets.get(number)
        if bucket is None or not bucket.holds(parameters, own):
            bucket = self._buckets[number] = _Bucket(parameters, own)
        return bucket.kept


class _Bucket:
    """Parameters of a bucket with their masks, and the kept positions that follow."""

    def __init__(self, parameters: list[Tensor], masks: list[Tensor | None]) -> None:
        self._parameters, self._masks = parameters, masks
        self.kept: Tensor | None = None
        if any(mask is not None for mask in masks):
            flat = [_in_memory_order(mask, p) for mask, p in zip(masks, parameters, strict=True)]
            self.kept = torch.cat(flat).nonzero().view(-1)

    def holds(self, parameters: list[Tensor], masks: list[Tensor | None]) -> bool:
        """Whether these are its parameters and masks, as objects."""
        before = (*self._parameters, *self._masks)
        now = (*parameters, *masks)
        return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))


def _in_memory_order(mask: Tensor | None, parameter: Tensor) -> Tensor:
    """The flat mask of a parameter, its elements in the order in which a bucket holds the gradient's."""
    if mask is None:
        return torch.ones(parameter.numel(), dtype=torch.bool, device=parameter.device)
    ordered = torch.empty_like(parameter, dtype=torch.bool, requires_grad=False)
    if ordered.stride() != parameter.stride():  # with gaps between elements: a bucket holds it contiguous
        return mask.reshape(-1)
    return ordered.copy_(mask).as_strided((parameter.numel(),), (1,))


def masked_allreduce_hook(state: KeptExchange, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Average the gradients of a bucket at kept positions over all processes; elsewhere they become zero.

    For ``DistributedDataParallel.register_comm_hook(KeptExchange(pruner), masked_allreduce_hook)``, also
    inside PyTorch's ``fp16_compress_wrapper`` and ``bf16_compress_wrapper``. Parameters without a mask travel
    whole, and so does everything in a step that uses the gradients of pruned weights, because units grow by
    them or because the optimizer moves pruned weights. Bytes are counted (`clicktrain.comm.counted`).
    """
    buffer: Tensor = bucket.buffer()
    masks, all_used = state.masks()
    kept = state.kept(bucket.index(), list(bucket.parameters()), masks)
    alone = None if all_used else kept
    sent = buffer if alone is None else buffer.index_select(0, alone)
    sent = sent.to(state.dtype or sent.dtype)
    sent.div_(dist.get_world_size(state.group))  # before they are added, or small formats overflow
    work = all_reduce_(sent, GRADIENTS, group=state.group, async_op=True)
    if kept is not None and all_used:
        outside = (len(buffer) - len(kept)) * sent.element_size()
        note(GRADIENTS, -outside, 0)
        note(GROWTH, outside, 0)

    def spread(done: Any) -> Tensor:
        done.value()  # raises what the all-reduce has raised: another process may have ended
        if alone is not None:
            return buffer.zero_().index_copy_(0, alone, sent.to(buffer.dtype))
        return buffer if sent is buffer else buffer.copy_(sent)

    return cast("torch.futures.Future[Tensor]", work.get_future().then(spread))


def check_hooks(wrapper: object) -> None:
    """Raise a UserError if a DistributedDataParallel compresses gradients in a way that masks forbid."""
    for _, state in getattr(wrapper, "_comm_hooks", ()):
        if type(state).__name__ == "PowerSGDState":
            raise UserError(
                "PowerSGD replaces gradients by matrices of low rank, and keeps what it left out for the "
                "next step: it gives pruned weights gradients, and masks move under what it keeps; register "
                "masked_allreduce_hook of clicktrain.comm, in fp16_compress_wrapper if it is to be smaller"
            )


if dist.is_available():  # DistributedDataParallel compares the classes themselves, not their names
    masked_allreduce_hook.__annotations__["bucket"] = vars(dist)["GradBucket"]
    masked_allreduce_hook.__annotations__["return"] = torch.futures.Future[Tensor]
