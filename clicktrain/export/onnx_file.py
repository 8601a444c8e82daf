"""ONNX: input ``images`` [batch, C, H, W], output ``logits`` [batch, K]; needs the optional packages."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.export.torch_file import capture

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages() -> None:
    """Raise UserError unless the packages that write and check ONNX files are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"export to onnx needs {', '.join(missing)}: run 'pip install {' '.join(missing)}'")


def write(model: nn.Module, example: Tensor, path: Path, facts: str) -> None:
    """Write one file with the weights inside and ``facts`` as metadata."""
    check_packages()
    # It warns at every export that torchvision operators are missing.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    captured = capture(model, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's about itself
        warnings.simplefilter("ignore", DeprecationWarning)
        program = torch.onnx.export(
            captured, dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
        )
    assert program is not None  # it is None only for the old exporter, which writes by itself
    program.model.metadata_props["clicktrain"] = facts
    program.save(path, external_data=False)


def read(path: Path) -> Callable[[Tensor], Tensor]:
    """Load the file into ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])

    return run
