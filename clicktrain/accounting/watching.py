"""Running a network only to watch it: as it is in plain Python, and without leaving a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from clicktrain.graph.inputs import Inputs


def plain(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper, where hooks work."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def eager(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Keep parts that compile themselves from doing so: hooks and modes watch plain Python."""
    if any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()):
        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return contextlib.nullcontext()


@contextlib.contextmanager
def no_trace(model: nn.Module, example: Inputs, *, training: bool) -> Iterator[None]:
    """Another mode; afterwards every module's mode, all buffers and the random state are as before.

    So are the attributes of modules (a counter in ``forward``), as far as they are not changed in place. The
    flags are set directly: ``model.eval()`` may be overridden and do more.

    Args:
        model: the network.
        example: inputs, on the device whose random state is to stay.
        training: False: evaluation mode. True: training mode, unless the model is in it already: then every
            module stays in the mode that it has (frozen batch norms).
    """
    modules = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({t.device for t in example.tensors() if t.is_cuda}, key=str)
    try:
        with torch.random.fork_rng(devices):
            if not (training and model.training):
                for module, _, _ in modules:
                    module.training = training
            yield
    finally:
        for module, attributes, own in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(own)
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
