"""DistributedDataParallel with an exchange of gradients that is counted, and none of buffers."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clicktrain.comm.kept_exchange import KeptExchange, masked_allreduce_hook


def data_parallel(network: nn.Module, state: KeptExchange) -> DistributedDataParallel:
    """Wrap a network so that its gradients are means over all processes.

    Buffers are the caller's: the index of packed layers follows from masks that all processes have, and
    PyTorch's own broadcast of the others would be counted nowhere.
    """
    names = [name for name, _ in network.named_buffers()]
    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(network, names)  # type: ignore[no-untyped-call]
    wrapper = DistributedDataParallel(network)
    wrapper.register_comm_hook(state, masked_allreduce_hook)
    return wrapper
