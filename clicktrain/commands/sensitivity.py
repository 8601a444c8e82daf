"""``clicktrain sensitivity RUN``: the accuracy that each layer alone costs, at several sparsities."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clicktrain.commands.arguments import JSON, OWN_MODEL, RUN, Command, Option
from clicktrain.errors import UserError
from clicktrain.wording import table_lines

if TYPE_CHECKING:
    from clicktrain.train import LoadedRun

_OPTIONS = (
    Option("sparsities", tuple[float, ...], "Shares of a layer's weights that are pruned.",
           (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)),
    Option("granularity", Literal["weight", "kernel"], "What is pruned as one.", "weight"),
    Option("images", int, "Validation images to measure on, evenly spread; 0 for all.", 1000),
    Option("batch_size", int | None, "Images per forward pass; as in training by default."),
    Option("device", str | None, "auto, cpu, cuda or mps; as in training by default."),
    Option("output", str | None, "The page; sensitivity.html in the run's folder by default.", short="-o",
           metavar="FILE"),
    OWN_MODEL,
    JSON,
)  # fmt: skip
COMMAND = Command(
    name="sensitivity",
    description="The accuracy of a finished run's network when each layer alone is pruned by magnitude at "
    "several sparsities, without training on: a table, a page, and sensitivity.json in the run's folder.",
    positional=RUN,
    groups={"this command": _OPTIONS},
    examples=(
        "clicktrain sensitivity runs/dense",
        "clicktrain sensitivity runs/dense --granularity kernel --sparsities 0.5 0.8 --images 0",
        "clicktrain sensitivity runs/dense --json",
    ),
    footer="A layer that loses much is a candidate for --exclude, or for a smaller ratio among --layers.",
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = {option.name: option.default for option in _OPTIONS} | COMMAND.parse(argv)
    if given["images"] < 0:
        raise UserError(f"images is {given['images']}: at least 1, or 0 for all")
    if given["output"] is not None and Path(given["output"]).is_dir():
        raise UserError(f"--output {given['output']} is a folder: give the name of a file")
    from clicktrain.formats.atomic import write_text_atomic
    from clicktrain.report import write_sensitivity
    from clicktrain.train import load_run

    loaded = load_run(given["run"], given["model"])
    folder = loaded.folder.path
    found = {"run": str(folder), **_measure(loaded, given)}
    text = json.dumps(found, indent=2) + "\n"
    output = folder / "sensitivity.html" if given["output"] is None else Path(given["output"])
    page = write_sensitivity(found, f"{folder.name}, {loaded.config.model}", output)
    write_text_atomic(folder / "sensitivity.json", text)
    if given["json"]:
        print(text, end="")
    else:
        print("\n".join([*lines(found), "", f"page: {page}"]))
    return 0


def _measure(loaded: LoadedRun, given: Mapping[str, Any]) -> dict[str, Any]:
    from rich.console import Console

    from clicktrain.commands.evaluate import images_of_run
    from clicktrain.train.device import resolve_device, set_up
    from clicktrain.train.sensitivity import SomeImages, layer_sensitivity

    names = [name for name in ("batch_size", "device") if given[name] is not None]
    config = replace(loaded.config, **{name: given[name] for name in names})
    device = resolve_device(config.device)
    set_up(config, device)
    data, loader = images_of_run(loaded, config, "val", device)
    kept = SomeImages(loader, len(data.val), given["images"] or None)
    with Console(stderr=True).status("measuring") as status:
        return layer_sensitivity(
            loaded.model.to(device),
            kept,
            device=device,
            sparsities=given["sparsities"],
            granularity=given["granularity"],
            precision=config.precision,
            views=config.test_time_augmentation,
            message=status.update,
        ).to_json()


def lines(found: Mapping[str, Any]) -> list[str]:
    """The table for people: accuracies, and the sparsity that a layer takes for a point."""
    from clicktrain.report.sensitivity import TOLERATED, tolerates

    head = ["layer", "shape", "now", *(f"{100 * share:g}%" for share in found["sparsities"]), "tolerates"]
    rows = []
    for layer in found["layers"]:
        best = tolerates(found["sparsities"], layer["lost"])
        rows.append(
            [
                layer["name"],
                "x".join(map(str, layer["shape"])),
                f"{100 * layer['sparsity']:.0f}%",
                *(f"{accuracy:.1f}" for accuracy in layer["accuracies"]),
                "-" if best is None else f"{100 * best:g}%",
            ]
        )
    return [
        f"{found['run']}: accuracy {found['accuracy']:.2f}% on {found['images']} images (standard error "
        f"{found['standard_error']:.2f} points), and with one layer pruned to",
        "",
        *table_lines([head, *rows]),
        "",
        f"tolerates: the largest of these sparsities up to which at most {TOLERATED:g} point is lost",
    ]
