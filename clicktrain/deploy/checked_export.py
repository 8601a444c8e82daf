"""Exporting a network: write a draft beside the target, load it back, compare, and only then rename it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.deploy import file_formats
from clicktrain.leftovers import remove_abandoned

Format = Literal["safetensors", "onnx", "torch"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[str, str] = {"safetensors": ".safetensors", "onnx": ".onnx", "torch": ".pt2"}
"""File suffix of each format."""

_BATCHES = (1, 3)  # of the check: the batch dimension must be free
RELATIVE = 1e-4
"""Allowed difference, relative to the largest logit. Folded batch norms and reordered fp32 sums stay two
orders of magnitude below it; a wrong weight or operator does not."""

Run = Callable[[Tensor], Tensor]
"""A network loaded from its file: images [B, C, H, W] -> logits [B, K]."""


class FinishedRun(Protocol):
    """A finished run: its network and the facts about it."""

    @property
    def model(self) -> nn.Module:
        """A plain module with the pruned weights at zero."""

    @property
    def facts(self) -> dict[str, Any]:
        """model, width, stem, num_classes, in_channels, image_shape, classes, mean, std: plain values."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H, W."""


@dataclass(frozen=True, slots=True)
class Exported:
    """A file that was written and checked: its logits differ from the network's by ``max_difference``."""

    path: Path
    format: Format
    num_bytes: int
    max_difference: float
    tolerance: float


def export_run(run: FinishedRun, format: Format, output: str | Path) -> Exported:
    """Write the network of a run to ``output``; an existing file is replaced, once the new one is checked.

    The file also carries the facts of the run as JSON under the key ``clicktrain`` (metadata of safetensors
    and ONNX, an extra file in a .pt2), so that images can be normalized and classes named without the run.

    ``format`` is ``safetensors`` (dense layout), ``onnx`` or ``torch`` (torch.export); any batch size.

    Raises:
        UserError: unknown format, a package or folder is missing, the network cannot be exported, or the file
            does not compute what the network does. No file is left then.
    """
    if format not in FORMATS:
        raise UserError(f"format is {format!r}: use one of {', '.join(FORMATS)}")
    output = Path(output)
    if output.is_dir():
        raise UserError(f"{output} is a folder: give the name of a file")
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent}: make it or give another file")
    model = run.model.eval()
    facts = json.dumps(run.facts)
    try:
        remove_abandoned(output.parent, r"\.export-(?P<pid>\d+)-.*")
        folder = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".export-{os.getpid()}-")
    except OSError as error:
        raise UserError(f"cannot write to {output.parent}: {error.strerror}") from None
    with folder as name, torch.no_grad():
        draft = Path(name) / f"export{SUFFIXES[format]}"
        reload = _write(format, model, run.image_shape, draft, facts)
        difference, tolerance = _compare(model, reload, run.image_shape)
        if not difference <= tolerance:  # also when it is nan
            raise UserError(
                f"the {format} file does not compute what the network does (largest difference "
                f"{difference:.3g}, allowed {tolerance:.3g}): nothing was written"
            )
        num_bytes = draft.stat().st_size
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(output)
    return Exported(output, format, num_bytes, difference, tolerance)


def _write(format: Format, model: nn.Module, shape: tuple[int, int, int], path: Path, facts: str) -> Run:
    """Write the file and load it as a network."""
    example = torch.zeros(2, *shape)  # not 1, which torch.export would take for a constant
    match format:
        case "safetensors":
            file_formats.write_safetensors(model, path, facts)
            return file_formats.read_safetensors(model, path)
        case "onnx":
            file_formats.write_onnx(model, example, path, facts)
            return file_formats.read_onnx(path)
        case "torch":
            file_formats.write_torch(model, example, path, facts)
            return torch.export.load(path).module()


def _compare(model: nn.Module, other: Run, shape: tuple[int, int, int]) -> tuple[float, float]:
    """Largest absolute difference of the logits on random images, and the allowed one."""
    generator = torch.Generator().manual_seed(0)
    largest, scale = 0.0, 1.0
    for batch in _BATCHES:
        x = torch.randn(batch, *shape, generator=generator)
        expected, got = model(x), other(x)
        if got.shape != expected.shape:
            raise UserError(
                f"the file gives outputs of shape {tuple(got.shape)} where the network gives "
                f"{tuple(expected.shape)}: nothing was written"
            )
        worst = (got.double() - expected.double()).abs().max().item()
        largest = max(largest, worst) if worst == worst else worst
        if largest != largest:
            break
        scale = max(scale, expected.abs().max().item())
    return largest, RELATIVE * scale
