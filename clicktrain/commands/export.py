"""``clicktrain export RUN --format F``: the network of a finished run, for other tools or as C."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clicktrain.commands.arguments import OWN_MODEL, RUN, Command, Option
from clicktrain.errors import UserError

if TYPE_CHECKING:
    from clicktrain.deploy import Images
    from clicktrain.train import LoadedRun

_CHECKED_IMAGES = 512

COMMAND = Command(
    name="export",
    description="Write the network of a finished run for other tools. The file is loaded back and compared "
    "with the network before it gets its name; C is compiled and run on validation images.",
    examples=(
        "clicktrain export runs/first --format onnx",
        "clicktrain export runs/first --format torch -o first.pt2",
        "clicktrain export runs/first --format c",
    ),
    positional=RUN,
    groups={
        "this command": (
            OWN_MODEL,
            Option(
                "format",
                Literal["safetensors", "onnx", "torch", "c"],
                "safetensors: weights and a description; onnx: for ONNX Runtime, OpenVINO and others; "
                "torch: a torch.export program (.pt2); c: a folder with the network in C, which needs a "
                "compiler and nothing else.",
            ),
            Option(
                "output",
                str | None,
                "The file; export.safetensors, export.onnx, export.pt2 or the folder export-c in the run's "
                "folder by default.",
                short="-o",
                metavar="FILE",
            ),
            Option(
                "name", str | None, "c: the name of files and functions; model by default.", metavar="NAME"
            ),
            Option(
                "images", int | None, f"c: validation images to compare on; {_CHECKED_IMAGES} by default."
            ),
        )
    },
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = COMMAND.parse(argv)
    if given.get("format") is None:
        raise UserError("--format is missing: use --format safetensors, onnx, torch or c")
    if given["format"] == "c":
        return _run_c(given)
    for flag in ("name", "images"):
        if given.get(flag) is not None:
            raise UserError(f"--{flag} belongs to --format c")
    from clicktrain.deploy import SUFFIXES, export_run
    from clicktrain.train import load_run

    loaded = load_run(given["run"], given.get("model"))
    folder = loaded.folder.path
    output = given.get("output")
    path = folder / f"export{SUFFIXES[given['format']]}" if output is None else Path(output)
    if path.resolve() in {own.resolve() for own in (loaded.folder.model, loaded.folder.packed)}:
        raise UserError(f"{path} belongs to the run itself: give another -o")
    done = export_run(loaded, given["format"], path)
    print(
        f"{done.path}: {done.num_bytes / 2**20:.2f} MB, "
        f"largest difference to the network {done.max_difference:.2g} (allowed {done.tolerance:.2g})"
    )
    return 0


def _run_c(given: dict[str, Any]) -> int:
    from clicktrain.deploy import export_c
    from clicktrain.train import load_run

    count = _CHECKED_IMAGES if given.get("images") is None else given["images"]
    if count < 1:
        raise UserError(f"images is {count}: must be at least 1")
    loaded = load_run(given["run"], given.get("model"))
    output = loaded.folder.path / "export-c" if given.get("output") is None else Path(given["output"])
    images, why = _validation_images(loaded, count)
    done = export_c(loaded, output, images, given.get("name") or "model")
    what = (
        f"{done.images} validation images" if images is not None else f"{done.images} random images ({why})"
    )
    print(
        f"{done.path}: weights {done.weight_bytes / 2**20:.2f} MB (dense {done.dense_bytes / 2**20:.2f} MB), "
        f"memory for one image at a time {done.memory_bytes / 2**20:.2f} MB"
    )
    print(
        f"built and run ({done.isa}) on {what}: largest difference to the network {done.max_difference:.2g} "
        f"(allowed {done.tolerance:.2g})"
        + (
            ""
            if done.accuracy is None
            else f", accuracy {done.accuracy:.2f}%, the network's {done.network_accuracy:.2f}%"
        )
    )
    return 0


def _validation_images(loaded: LoadedRun, count: int) -> tuple[Images | None, str]:
    """The first validation images of a run; or None and why they cannot be had."""
    from dataclasses import replace

    import torch

    from clicktrain.train.prepare import make_eval_loader, open_run_data

    config = replace(loaded.config, device="cpu")
    try:
        data = open_run_data(config, loaded.value_range)
        if tuple(data.image_shape) != loaded.image_shape:
            raise UserError(f"the images of {config.data} have another size by now")
        data = replace(data, mean=tuple(loaded.facts["mean"]), std=tuple(loaded.facts["std"]))
        loader = make_eval_loader(config, data, "val", torch.device("cpu"))
    except UserError as error:
        return None, str(error)

    def batches() -> Images:
        left = count
        for x, y in loader.epoch(0):
            yield x[:left], y[:left]
            left -= len(x[:left])
            if left <= 0:
                return

    return batches(), ""
