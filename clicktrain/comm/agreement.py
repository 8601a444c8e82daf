"""Agreement of several training processes: the first one decides.

Weights, gradients and losses are the same in all processes of data-parallel training, and so is what follows
from them. Measured times and batch-norm statistics are not. Without a process group nothing is sent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from clicktrain.comm.collectives import AGREEMENT, all_reduce_, broadcast_
from clicktrain.errors import FailedElsewhere, UserError

T = TypeVar("T")


_patient: dist.ProcessGroup | None = None
"""The group whose members wait for long while one of them works for all; None: that of everything."""


@contextlib.contextmanager
def patient_group(group: dist.ProcessGroup) -> Iterator[None]:
    """`of_first` and `all_or_none` use this group in the block."""
    global _patient
    before, _patient = _patient, group
    try:
        yield
    finally:
        _patient = before


def several_processes() -> bool:
    """Whether there is more than one training process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agreed(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The first process's numbers, in all of them; each gives as many. GPU backends send from ``device``."""
    if not several_processes():
        return list(numbers)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sent = torch.tensor(list(numbers), dtype=dtype, device=device)
    broadcast_(sent)
    return [float(number) for number in sent.tolist()]


def agreed_text(text: str, device: torch.device) -> str:
    """The first process's text, in all of them."""
    if not several_processes():
        return text
    data = text.encode()
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    broadcast_(length)
    sent = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if dist.get_rank() == 0:
        sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    broadcast_(sent)
    return bytes(sent.cpu().tolist()).decode()


def agree_on_(tensors: Sequence[Tensor]) -> None:
    """Write the first process's values into tensors; bool ones too."""
    if not several_processes():
        return
    for tensor in tensors:
        sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
        broadcast_(sent)
        tensor.copy_(sent)


def mean_over_processes(value: Tensor, purpose: str = AGREEMENT) -> Tensor:
    """The mean of a tensor over all processes, in place; ``purpose``: what it is counted as."""
    if several_processes():
        all_reduce_(value, purpose)
        value /= dist.get_world_size()
    return value


def sum_over_processes(
    value: Tensor, purpose: str = AGREEMENT, group: dist.ProcessGroup | None = None
) -> Tensor:
    """The sum of a tensor over all processes, or those of a group, in place.

    ``purpose``: what it is counted as.
    """
    if several_processes():
        all_reduce_(value, purpose, group=group)
    return value


def largest_over_processes(number: int, device: torch.device) -> int:
    """The largest of the processes' numbers."""
    if not several_processes():
        return number
    sent = torch.tensor([number], dtype=torch.int64, device=device)
    all_reduce_(sent, AGREEMENT, dist.ReduceOp.MAX)
    return int(sent)


def gathered(own: T, group: dist.ProcessGroup | None = None, patiently: bool = False) -> list[T]:
    """What each process has, by rank; small things only, they travel pickled between processes of one run.

    ``patiently``: some of them may work for minutes before they have it.
    """
    if not several_processes():
        return [own]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own, group=_patient if patiently else group)
    return everyone


def of_first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them; its `UserError` is everybody's.

    Raises:
        UserError: the first process raised it; `FailedElsewhere` in the others.
    """
    if not several_processes():
        return make()
    message: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            message = [make(), None]
        except UserError as error:
            dist.broadcast_object_list([None, str(error)], 0, group=_patient)
            raise
    dist.broadcast_object_list(message, 0, group=_patient)
    if message[1] is not None:
        raise FailedElsewhere(message[1])
    made: T = message[0]
    return made


def all_or_none(make: Callable[[], T]) -> T:
    """What each process makes for itself, unless one of them cannot: then none goes on.

    Raises:
        UserError: in the first process, what the first of those says that cannot; `FailedElsewhere` in the
            others.
    """
    made, error = None, None
    try:
        made = make()
    except UserError as mistake:
        error = mistake
        if not several_processes():
            raise
    said = gathered(None if error is None else str(error), _patient)
    rank = next((rank for rank, text in enumerate(said) if text is not None), None)
    if rank is None:
        return made  # type: ignore[return-value]
    if dist.get_rank() > 0:
        raise FailedElsewhere(said[rank])
    raise UserError(said[rank] if rank == 0 else f"process {rank}: {said[rank]}")
