"""`clicktrain.export`: the network of a loop of one's own, for other tools or as C."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from clicktrain.deploy.c_folder import ExportedC, export_c
from clicktrain.deploy.checked_export import FORMATS, SUFFIXES, Exported, export_run
from clicktrain.deploy.comparison import Images
from clicktrain.deploy.plain import plain_copy
from clicktrain.errors import UserError, shown

IMAGES = 512
"""Images that an export is compared on, where there are as many."""

OwnImages: TypeAlias = Iterable[Any]
"""Batches: images, or a tuple that begins with images and their classes."""


@dataclass(frozen=True)
class OwnNetwork:
    """As a finished run: a plain network on the CPU, and what is known about it."""

    model: nn.Module
    facts: dict[str, Any]
    image_shape: tuple[int, ...]


def export(
    model: nn.Module,
    example: Tensor,
    path: str | PathLike[str],
    *,
    format: str | None = None,
    images: OwnImages | None = None,
    count: int = IMAGES,
    facts: Mapping[str, Any] | None = None,
    name: str = "model",
    calibration: OwnImages | None = None,
) -> Exported | ExportedC:
    """Write a network for other tools or as C; it is loaded back and compared before it gets its name.

    The network may be packed, accelerated, in any mode, on any device: a copy is exported, in float32.

    Args:
        example: images [N, C, H, W] as the network takes them.
        path: what it ends in says the format: ``.safetensors``, ``.onnx``, ``.pt2`` (torch.export), ``.xml``
            (OpenVINO), ``.pte`` (ExecuTorch) or ``.mlpackage`` (Core ML); without one it is a folder in C.
        format: its name, if the path does not say it: ``safetensors``, ``onnx``, ``torch``, ``openvino``,
            ``executorch``, ``coreml``, ``c``.
        images: batches to compare on, a validation loader for example: with classes the accuracy of both is
            measured. Without any the ``example`` is compared.
        count: images of these, at most.
        facts: for whoever reads the file, as JSON: ``classes``, ``mean`` and ``std`` are also in the C code.
        name: in C, of files and functions.
        calibration: in C, batches of training images, or a tensor of them: sparse convolutions can then be
            computed with int8 numbers, whose ranges are found on them.

    Returns:
        What was written, how near it comes to the network, and its size; ``print`` shows it.

    Raises:
        UserError: a package is missing, the network has something that the format has not, or what was
            written does not compute what the network does. Nothing is left then.

    Example:
        ``print(clicktrain.export(model, x, "net.onnx", images=val_loader))``
    """
    target = Path(path)
    chosen = _format(target) if format is None else format
    if chosen not in (*FORMATS, "c"):
        raise UserError(f"format is {chosen!r}: use one of {', '.join((*FORMATS, 'c'))}")
    if not isinstance(example, Tensor) or example.dim() < 2 or len(example) == 0:
        raise UserError("example has to be a tensor with at least one image, [N, C, H, W]")
    if count < 1:
        raise UserError(f"count is {count}: must be at least 1")
    plain = plain_copy(model, "clicktrain.export").float()
    network = OwnNetwork(plain, {"model": type(model).__name__, **(facts or {})}, tuple(example.shape[1:]))
    compared = _first([example] if images is None else images, count, "images")
    if chosen == "c":
        ranges = None if calibration is None else _alone(_first(calibration, IMAGES, "calibration"))
        return export_c(network, target, compared, name, ranges)
    if name != "model" or calibration is not None:
        raise UserError("name and calibration belong to format c")
    return export_run(network, chosen, target, compared)  # type: ignore[arg-type]


def _format(path: Path) -> str:
    by_suffix = {suffix: name for name, suffix in SUFFIXES.items()}
    if path.suffix in by_suffix:
        return by_suffix[path.suffix]
    if path.suffix == "":
        return "c"
    raise UserError(
        f"{path}: names of files end in {', '.join(by_suffix)}, a folder in C has no ending; or give format="
    )


def _alone(images: Images) -> Iterator[Tensor]:
    return (x for x, _ in images)


def _first(images: OwnImages, count: int, name: str) -> Images:
    """The first ``count`` images of batches of several forms, or of one tensor; ``name``: of the argument."""
    if not isinstance(images, Iterable):
        raise UserError(f"{name} is {shown(images)}: give batches of images, a loader for example")
    return _batches([images] if isinstance(images, Tensor) else images, count, name)


def _batches(images: OwnImages, count: int, name: str) -> Images:
    left = count
    for batch in images:
        x, y = (batch[0], batch[1]) if isinstance(batch, (tuple, list)) and len(batch) > 1 else (batch, None)
        if isinstance(x, (tuple, list)) and len(x) == 1:
            x = x[0]
        if not isinstance(x, Tensor):
            raise UserError(
                f"{name} gives batches of {shown(type(batch).__name__)}: tensors or (images, classes)"
            )
        yield x[:left].detach().cpu(), y[:left].cpu() if isinstance(y, Tensor) else None
        left -= len(x[:left])
        if left <= 0:
            return
