"""Exporting a network: write a draft beside the target, load it back, compare, and only then rename it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from torch import nn

from clicktrain.deploy.comparison import Comparison, Images, batches, compare
from clicktrain.deploy.file_formats import FILE_FORMATS, FileFormat, Format
from clicktrain.errors import UserError
from clicktrain.leftovers import remove_abandoned

FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[str, str] = {name: one.suffix for name, one in FILE_FORMATS.items()}
"""File suffix of each format."""


class FinishedRun(Protocol):
    """A finished run: its network and the facts about it."""

    @property
    def model(self) -> nn.Module:
        """A plain module with the pruned weights at zero."""

    @property
    def facts(self) -> dict[str, Any]:
        """model, width, stem, num_classes, in_channels, image_shape, classes, mean, std: plain values."""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """C, H, W."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported(Comparison):
    """A file that was written, loaded back and compared with the network.

    Attributes:
        path: of the file; OpenVINO's weights lie beside it.
        num_bytes: of all that was written.
        weights: of the network's layers, without biases and norms.
        zeros: of these, that are exactly zero: files have them like any other number.
    """

    path: Path
    format: Format
    num_bytes: int
    weights: int
    zeros: int

    def sentences(
        self, images: str = "images", kept_alone: str = "clicktrain.save and format c"
    ) -> list[str]:
        """What was written and how it was checked; ``kept_alone``: where kept weights are without zeros."""
        share = self.zeros / max(self.weights, 1)
        size = f"{self.path}: {self.num_bytes / 2**20:.2f} MB"
        if share >= 0.01:
            size += (
                f", {100 * share:.0f}% of its weights are zeros, which this format stores like others "
                f"({kept_alone} leave them out)"
            )
        engine = FILE_FORMATS[self.format].engine
        return [size, f"loaded back and run ({engine}) on {self.images} {images}: {self.sentence()}"]

    def __str__(self) -> str:
        return "\n".join(self.sentences())


def export_run(
    run: FinishedRun, format: Format, output: str | Path, images: Images | None = None
) -> Exported:
    """Write the network of a run to ``output``; an existing file is replaced, once the new one is checked.

    The file also carries the facts of the run as JSON under the key ``clicktrain`` (metadata of safetensors,
    ONNX and Core ML, runtime information of OpenVINO, an extra file in a .pt2), so that images can be
    normalized and classes named without the run.

    Args:
        format: one of `FORMATS`; any batch size, or one image a call (executorch, coreml).
        images: what the file is compared on; random numbers without any.

    Raises:
        UserError: unknown format, a package or folder is missing, the network cannot be exported, or the file
            does not compute what the network does. No file is left then.
    """
    if format not in FILE_FORMATS:
        raise UserError(f"format is {format!r}: use one of {', '.join(FORMATS)}")
    kind, output = FILE_FORMATS[format], Path(output)
    kind.check(format)
    _check_target(kind, output)
    model = run.model.eval()
    with drafts_beside(output) as folder, torch.no_grad():
        draft = folder / f"export{kind.suffix}"
        example = torch.zeros(2, *run.image_shape)  # not 1, which torch.export would take for a constant
        kind.write(model, example, draft, json.dumps(run.facts))
        found = compare(model, kind.read(model, draft), batches(images, run.image_shape))
        found.check(f"the {format} file")
        num_bytes = _take_place(kind, draft, output)
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    return Exported(
        path=output,
        format=format,
        num_bytes=num_bytes,
        weights=sum(weight.numel() for weight in weights),
        zeros=sum(int((weight == 0).sum()) for weight in weights),
        max_difference=found.max_difference,
        tolerance=found.tolerance,
        images=found.images,
        accuracy=found.accuracy,
        network_accuracy=found.network_accuracy,
    )


@contextlib.contextmanager
def drafts_beside(output: Path) -> Iterator[Path]:
    """A folder beside the target for what is not checked yet; UserError if none can be made."""
    try:
        remove_abandoned(output.parent, r"\.export-(?P<pid>\d+)-.*")
        folder = tempfile.TemporaryDirectory(dir=output.parent, prefix=f".export-{os.getpid()}-")
    except OSError as error:
        raise UserError(f"cannot write to {output.parent}: {error.strerror}") from None
    with folder as name:
        yield Path(name)


def _check_target(kind: FileFormat, output: Path) -> None:
    if not output.parent.is_dir():
        raise UserError(f"there is no folder {output.parent}: make it or give another file")
    if kind.second is not None and output.suffix != kind.suffix:
        raise UserError(
            f"{output} has to end in {kind.suffix}: the weights go into the {kind.second} file beside it"
        )
    if output.is_dir() and not (kind.whole_folder and output.suffix == kind.suffix):
        raise UserError(f"{output} is a folder: give the name of a file")


def _take_place(kind: FileFormat, draft: Path, output: Path) -> int:
    """Move what was checked to where it belongs; its bytes."""
    if kind.whole_folder:
        num_bytes = sum(path.stat().st_size for path in draft.rglob("*") if path.is_file())
        if output.exists():
            shutil.rmtree(output)
        draft.replace(output)
        return num_bytes
    # The weights first: what is named by the user is whole once it is there.
    suffixes = [*([kind.second] if kind.second else []), kind.suffix]
    num_bytes = 0
    for suffix in suffixes:
        part = draft.with_suffix(suffix)
        num_bytes += part.stat().st_size
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(output if suffix == kind.suffix else output.with_suffix(suffix))
    return num_bytes
