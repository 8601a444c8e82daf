"""``clicktrain evaluate RUN``: accuracy and loss of a finished run, on its own data or other data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from clicktrain.commands.arguments import Command, Option, Positional
from clicktrain.errors import UserError

if TYPE_CHECKING:
    from clicktrain.data import ImageData
    from clicktrain.train import LoadedRun, RunConfig

_COMMAND = Command(
    name="evaluate",
    description="Accuracy and loss of a finished run on the validation images.",
    positional=Positional("run", "Folder of the run."),
    groups={
        "this command": (
            Option(
                "data",
                str | None,
                "Other images, written as for train; the run's own by default.",
                metavar="SPEC",
            ),
            Option(
                "batch_size", int | None, "Images per forward pass; as in training by default.", metavar="N"
            ),
            Option(
                "device", str | None, "auto, cpu, cuda or mps; as in training by default.", metavar="NAME"
            ),
            Option("json", bool, "Print one JSON object.", False),
        )
    },
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = _COMMAND.parse(argv)
    from clicktrain.train import load_run

    loaded = load_run(given["run"])
    names = [name for name in ("data", "batch_size", "device") if given.get(name) is not None]
    config = replace(loaded.config, **{name: given[name] for name in names})
    result = _evaluate(loaded, config)
    if given.get("json"):
        print(json.dumps(result, indent=2))
        return 0
    top5 = "" if result["top5_accuracy"] is None else f", top-5 {result['top5_accuracy']:.2f}%"
    print(
        f"{result['run']}: accuracy {result['val_accuracy']:.2f}%{top5}, loss {result['val_loss']:.4f} "
        f"on {result['images']} images of {result['data']}"
    )
    return 0


def _evaluate(loaded: LoadedRun, config: RunConfig) -> dict[str, Any]:
    from clicktrain.train import evaluate
    from clicktrain.train.device import resolve_device, set_up
    from clicktrain.train.prepare import make_val_loader, open_run_data

    device = resolve_device(config.device)
    set_up(config, device)
    if config.data != loaded.config.data:
        _, height, width = loaded.image_shape
        config = replace(config, image_size=height if height == width else None)
    data = _fitting(loaded, open_run_data(config), config.data)
    result = evaluate(
        loaded.model.to(device),
        make_val_loader(config, data, device),
        device=device,
        precision=config.precision,
    )
    assert result is not None  # only a stop that is asked for gives none
    return {
        "run": str(loaded.folder.path),
        "data": config.data,
        "images": result.images,
        "val_accuracy": result.accuracy,
        "top5_accuracy": result.top5_accuracy,
        "val_loss": result.loss,
        "compression_ratio": loaded.summary["compression_ratio"],
    }


def _fitting(loaded: LoadedRun, data: ImageData, spec: str) -> ImageData:
    """The data as the network is used to see it: normalised as in training; UserError if it does not fit."""
    if tuple(data.image_shape) != loaded.image_shape:
        has, needs = ("x".join(map(str, shape)) for shape in (data.image_shape, loaded.image_shape))
        raise UserError(
            f"the images of {spec} are {has} (channels, height, width): the network takes {needs}"
        )
    classes = list(loaded.facts["classes"])
    if list(data.classes) != classes:
        raise UserError(
            f"{spec} has {len(data.classes)} classes ({_some(data.classes)}): the network was trained on "
            f"{len(classes)} ({_some(classes)})"
        )
    return replace(data, mean=tuple(loaded.facts["mean"]), std=tuple(loaded.facts["std"]))


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
