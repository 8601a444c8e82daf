"""Write a network in each format, and load the file back as a network.

- safetensors: every parameter and buffer in the dense layout, under the names of the state dict.
- torch: a torch.export program (.pt2), which runs without the code of the network.
- onnx: input ``images`` [batch, C, H, W], output ``logits`` [batch, K]; needs the optional packages.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clicktrain.errors import UserError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide PyTorch's deprecation warnings about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def write_safetensors(model: nn.Module, path: Path, facts: str) -> None:
    """Write the state dict, shared tensors too, with ``facts`` as metadata."""
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt", "clicktrain": facts})


def read_safetensors(model: nn.Module, path: Path) -> nn.Module:
    """Load the weights of the file into a copy of the network."""
    other = copy.deepcopy(model)
    other.load_state_dict(load_file(path))
    return other


def capture(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Capture the network as a program of any batch size; UserError if PyTorch cannot."""
    try:
        with _without_warnings():
            return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # the network's own code may raise anything when it is traced
        first = str(error).strip().split("\n")[0]
        raise UserError(
            f"torch.export cannot capture this network: {type(error).__name__}: {first}"
        ) from error


def write_torch(model: nn.Module, example: Tensor, path: Path, facts: str) -> None:
    """Write the program, with ``facts`` as the extra file ``clicktrain``."""
    torch.export.save(capture(model, example), path, extra_files={"clicktrain": facts})


def write_onnx(model: nn.Module, example: Tensor, path: Path, facts: str) -> None:
    """Write one file with the weights inside and ``facts`` as metadata; UserError without the packages."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"export to onnx needs {', '.join(missing)}: run 'pip install {' '.join(missing)}'")
    # It warns at every export that torchvision operators are missing.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    captured = capture(model, example)
    with _without_warnings():
        program = torch.onnx.export(
            captured, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
        )
    assert program is not None  # it is None only for the old exporter, which writes by itself
    program.model.metadata_props["clicktrain"] = facts
    program.save(path, external_data=False)


def read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """Load the file into ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
