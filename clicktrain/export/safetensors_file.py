"""Weights in the dense layout, under the names of the network's state dict."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def write(model: nn.Module, path: Path, facts: str) -> None:
    """Write every parameter and buffer, shared ones too, with ``facts`` as metadata."""
    tensors = {
        name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()
    }
    save_file(tensors, path, metadata={"format": "pt", "clicktrain": facts})


def read(model: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    """Load the weights of the file into a copy of the network."""
    other = copy.deepcopy(model)
    other.load_state_dict(load_file(path))
    return other
