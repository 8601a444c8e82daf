"""``clicktrain export RUN --format F``: the network of a finished run, for other tools or as C."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from clicktrain.commands.arguments import OWN_MODEL, RUN, Command, Option
from clicktrain.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from clicktrain.deploy import Images
    from clicktrain.train import LoadedRun

_CHECKED_IMAGES = 512
_CALIBRATION_IMAGES = 512
_Format = Literal["safetensors", "onnx", "torch", "openvino", "executorch", "coreml", "c"]

COMMAND = Command(
    name="export",
    description="Write the network of a finished run for other tools. What was written is loaded back, or "
    "compiled, and run on validation images of the run before it gets its name: the difference to the "
    "network and the accuracy of both are printed.",
    examples=(
        "clicktrain export runs/first --format onnx",
        "clicktrain export runs/first --format torch -o first.pt2",
        "clicktrain export runs/first --format c",
        "clicktrain export runs/first --format c --int8",
    ),
    positional=RUN,
    groups={
        "this command": (
            OWN_MODEL,
            Option(
                "format",
                _Format,
                "safetensors: weights and a description; onnx: for ONNX Runtime and others; torch: a "
                "torch.export program (.pt2); openvino: OpenVINO's .xml and .bin; executorch: a program for "
                "phones (.pte, XNNPACK); coreml: a Core ML program, on macOS; c: a folder with the network "
                "in C, which needs a compiler and nothing else.",
            ),
            Option(
                "output",
                str | None,
                "The file; by default export with the format's ending, or the folder export-c, in the run's "
                "folder.",
                short="-o",
                metavar="FILE",
            ),
            Option(
                "name", str | None, "c: the name of files and functions; model by default.", metavar="NAME"
            ),
            Option(
                "int8",
                bool,
                "c: sparse 1x1 and 3x3 convolutions behind ReLU also in int8, where the processor has "
                "AVX512_VNNI; ranges are found on training images, accuracies are printed.",
                default=False,
            ),
            Option("images", int | None, f"Validation images to compare on; {_CHECKED_IMAGES} by default."),
        )
    },
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = COMMAND.parse(argv)
    format = given.get("format")
    if format is None:
        raise UserError(f"--format is missing: use one of {', '.join(get_args(_Format))}")
    count = _CHECKED_IMAGES if given.get("images") is None else given["images"]
    if count < 1:
        raise UserError(f"images is {count}: must be at least 1")
    for flag in ("name", "int8"):
        if format != "c" and given.get(flag):
            raise UserError(f"--{flag} belongs to --format c")
    from clicktrain.deploy import FILE_FORMATS, SUFFIXES, export_c, export_run
    from clicktrain.train import load_run

    loaded = load_run(given["run"], given.get("model"))
    if format != "c":
        FILE_FORMATS[format].check(format)
    folder = loaded.folder.path
    default = "export-c" if format == "c" else f"export{SUFFIXES[format]}"
    path = folder / default if given.get("output") is None else Path(given["output"])
    if path.resolve() in {own.resolve() for own in (loaded.folder.model, loaded.folder.packed)}:
        raise UserError(f"{path} belongs to the run itself: give another -o")
    images, why = _validation_images(loaded, count)
    what = "validation images" if images is not None else f"random images ({why})"
    if format == "c":
        calibration = _calibration_images(loaded) if given.get("int8") else None
        name = given.get("name") or "model"
        lines = export_c(loaded, path, images, name, calibration).sentences(what)
    else:
        lines = export_run(loaded, format, path, images).sentences(
            what, "the run's packed.safetensors and --format c"
        )
    for line in lines:
        print(line)
    now, before = loaded.summary.get("parameters"), loaded.summary.get("dense_parameters")
    if isinstance(now, int) and isinstance(before, int) and now < before:
        print(f"channels that were removed are not in it: {now:,} of {before:,} parameters are left")
    return 0


def _validation_images(loaded: LoadedRun, count: int) -> tuple[Images | None, str]:
    """The first validation images of a run; or None and why they cannot be had."""
    try:
        return _images(loaded, "val", count), ""
    except UserError as error:
        return None, str(error)


def _calibration_images(loaded: LoadedRun) -> Iterator[Tensor]:
    """Training images of a run as validation images are prepared; UserError if they cannot be had."""
    try:
        found = _images(loaded, "train", _CALIBRATION_IMAGES)
    except UserError as error:
        raise UserError(f"int8 needs training images to find ranges on: {error}") from None
    return (x for x, _ in found)


def _images(loaded: LoadedRun, split: Literal["train", "val"], count: int) -> Images:
    """The first images of a split of a run's data, without augmentation."""
    from dataclasses import replace

    import torch

    from clicktrain.train.prepare import make_eval_loader, open_run_data

    config = replace(loaded.config, device="cpu")
    data = open_run_data(config, loaded.value_range)
    if tuple(data.image_shape) != loaded.image_shape:
        raise UserError(f"the images of {config.data} have another size by now")
    data = replace(data, mean=tuple(loaded.facts["mean"]), std=tuple(loaded.facts["std"]))
    loader = make_eval_loader(config, data, split, torch.device("cpu"))

    def batches() -> Images:
        left = count
        for x, y in loader.epoch(0):
            yield x[:left], y[:left]
            left -= len(x[:left])
            if left <= 0:
                return

    return batches()
