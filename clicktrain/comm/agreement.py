"""Agreement of several training processes: the first one decides.

Weights, gradients and losses are the same in all processes of data-parallel training, and so is what follows
from them. Measured times and batch-norm statistics are not. Without a process group nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def several_processes() -> bool:
    """Whether there is more than one training process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def agreed(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The first process's numbers, in all of them; each gives as many. GPU backends send from ``device``."""
    if not several_processes():
        return list(numbers)
    dtype = torch.float32 if device.type == "mps" else torch.float64
    sent = torch.tensor(list(numbers), dtype=dtype, device=device)
    dist.broadcast(sent, 0)
    return [float(number) for number in sent.tolist()]


def agreed_text(text: str, device: torch.device) -> str:
    """The first process's text, in all of them."""
    if not several_processes():
        return text
    data = text.encode()
    length = torch.tensor([len(data)], dtype=torch.int64, device=device)
    dist.broadcast(length, 0)
    sent = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if dist.get_rank() == 0:
        sent.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(sent, 0)
    return bytes(sent.cpu().tolist()).decode()


def agree_on_(tensors: Sequence[Tensor]) -> None:
    """Write the first process's values into tensors; bool ones too."""
    if not several_processes():
        return
    for tensor in tensors:
        sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
        dist.broadcast(sent, 0)
        tensor.copy_(sent)


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, in place."""
    if several_processes():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value
