"""What the processes of a run exchange in a step: gradients, and buffers of which each has its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from clicktrain.comm import KeptExchange
from clicktrain.comm.collectives import BUFFERS, GRADIENTS, GROWTH, Exchange, broadcast_
from clicktrain.comm.data_parallel import data_parallel
from clicktrain.comm.sync_batch_norm import SYNCHRONIZED
from clicktrain.kernels.pack_model import index_names
from clicktrain.train.prepare import Prepared
from clicktrain.train.state import TrainState

_DTYPES = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def in_parallel(network: nn.Module, prepared: Prepared) -> DistributedDataParallel:
    """Wrap the network so that gradients are means over all processes, as ``exchange`` says.

    Buffers are left to `share_buffers_`.
    """
    config = prepared.config
    dtype = _DTYPES[config.exchange_dtype]
    return data_parallel(
        network, KeptExchange(prepared.pruner, dense=config.exchange == "dense", dtype=dtype)
    )


@torch.no_grad()
def share_buffers_(network: nn.Module, norms_alike: bool = True) -> None:
    """Write the first process's buffers into those of all, where they may differ.

    Counts of batches are alike, and so is the index of packed layers; statistics of synchronized norms too if
    all processes share them (``norms_alike``).
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in _own_buffers(network, norms_alike):
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        sent = torch.cat([buffer.reshape(-1) for buffer in buffers])
        broadcast_(sent, BUFFERS)
        parts = torch.split(sent, [buffer.numel() for buffer in buffers])
        for buffer, values in zip(buffers, parts, strict=True):
            buffer.copy_(values.view(buffer.shape))


def _own_buffers(network: nn.Module, norms_alike: bool) -> list[Tensor]:
    """The buffers that each process has its own values of."""
    index = set(index_names(network))
    found = []
    for path, module in network.named_modules():
        if norms_alike and isinstance(module, SYNCHRONIZED):
            continue
        for leaf, buffer in module.named_buffers(recurse=False):
            counts = isinstance(module, _BatchNorm) and leaf == "num_batches_tracked"
            if not counts and (f"{path}.{leaf}" if path else leaf) not in index:
                found.append(buffer)
    return found


def epoch_figures(state: TrainState, processes: int) -> dict[str, Any]:
    """What each process has handed to collectives in the training steps of an epoch; none if it is alone.

    ``exchange_bytes`` and ``exchange_calls`` over all ``exchange_steps`` optimizer steps; ``exchange`` the
    same by purpose (`clicktrain.comm.collectives`).
    """
    if processes == 1:
        return {}
    return {"processes": processes, **_figures(state.totals.exchange, state.totals.exchange_steps)}


def run_figures(state: TrainState, processes: int, dense_gradients: int) -> dict[str, Any]:
    """The same of all steps of a run that several processes have made.

    ``exchange_ratio``: bytes of gradients over what the network as it was at first, in ``dense_gradients``
    bytes, would have exchanged in these steps.
    """
    if not state.exchange_steps:
        return {}
    sent = sum(state.exchange.get(purpose, [0])[0] for purpose in (GRADIENTS, GROWTH))
    return {
        "processes": processes,
        **_figures(state.exchange, state.exchange_steps),
        "exchange_ratio": sent / max(state.exchange_steps * dense_gradients, 1),
    }


def _figures(exchange: Exchange, steps: int) -> dict[str, Any]:
    return {
        "exchange_steps": steps,
        "exchange_bytes": sum(size for size, _ in exchange.values()),
        "exchange_calls": sum(calls for _, calls in exchange.values()),
        "exchange": {purpose: {"bytes": row[0], "calls": row[1]} for purpose, row in exchange.items()},
    }
