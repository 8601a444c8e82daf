"""Activations as PyTorch computes them, where no kernel does."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.kernels.activations import Activation


def in_torch(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The same function as PyTorch has it."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda x: x,
        "relu": torch.relu,
        "clamp": lambda x: F.hardtanh(x, activation.low, activation.high),
        "leaky": lambda x: F.leaky_relu(x, activation.low),
        "hardswish": F.hardswish,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }
    return functions[activation.name]
