"""A torch.export program (.pt2): runs without the code of the network."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError


def capture(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Capture the network as a program of any batch size; UserError if PyTorch cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch's about itself
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # the network's own code may raise anything when it is traced
        first = str(error).strip().split("\n")[0]
        raise UserError(
            f"torch.export cannot capture this network: {type(error).__name__}: {first}"
        ) from error


def write(model: nn.Module, example: Tensor, path: Path, facts: str) -> None:
    """Write the program, with ``facts`` as the extra file ``clicktrain``."""
    torch.export.save(capture(model, example), path, extra_files={"clicktrain": facts})


def read(path: Path) -> Callable[[Tensor], Tensor]:
    """Load the program of the file."""
    module: nn.Module = torch.export.load(path).module()
    return module
