"""``clicktrain bench WHAT``: measurements side by side in one process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clicktrain.commands.arguments import Command, Option, Positional
from clicktrain.errors import UserError

_COMMAND = Command(
    name="bench",
    description="Time steps of ClickTrain's stages beside the dense step on the same batch.",
    positional=Positional("what", "What to measure: stages."),
    groups={
        "this command": (
            Option("model", str, "Network of the zoo.", "resnet18"),
            Option("preset", str, "Settings of ClickTrain: default, paper or one-shot.", "default"),
            Option("batch_size", int, "Images per step.", 64),
            Option("image_size", int, "Side of the images in pixels.", 32),
            Option("steps", int, "Measured steps per stage.", 7),
            Option("device", str, "cpu, cuda or mps.", "cpu"),
            Option("threads", int | None, "CPU threads; PyTorch's own choice by default."),
            Option("json", str | None, "Also write the result to a file.", metavar="FILE"),
        )
    },
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = {option.name: option.default for option in _COMMAND.groups["this command"]}
    given.update(_COMMAND.parse(argv))
    if given["what"] != "stages":
        raise UserError(f"there is no benchmark {given['what']!r}: use 'clicktrain bench stages'")
    import torch

    from clicktrain.bench.stages import bench_stages, to_json
    from clicktrain.formats.atomic import write_text_atomic
    from clicktrain.methods import ClickTrain
    from clicktrain.train.device import resolve_device
    from clicktrain.train.machine import cpu_name, gpu_name, versions

    device = resolve_device(given["device"])
    if given["threads"] is not None:
        torch.set_num_threads(given["threads"])
    rows = bench_stages(
        given["model"],
        method=ClickTrain(preset=given["preset"]),
        batch_size=given["batch_size"],
        image_size=given["image_size"],
        steps=given["steps"],
        device=str(device),
    )
    about = {
        "cpu": cpu_name(),
        "gpu": gpu_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    result = {"machine": about, "settings": _plain(given), "rows": to_json(rows)}
    if given["json"] is not None:
        write_text_atomic(Path(given["json"]), json.dumps(result, indent=2) + "\n")
    _show(result)
    return 0


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key != "json"}


def _show(result: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    settings = result["settings"]
    title = f"{settings['model']}, batch {settings['batch_size']}, preset {settings['preset']}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for head in ("stage", "steps", "dense ms", "stage ms", "over dense"):
        table.add_column(head, justify="left" if head == "stage" else "right")
    for row in result["rows"]:
        cells = (f"{row['dense_ms']:.1f}", f"{row['stage_ms']:.1f}", f"{row['ratio']:.3f}x")
        table.add_row(row["stage"], str(row["steps"]), *cells)
    console = Console()
    console.print(table)
    machine = result["machine"]
    console.print(
        f"on {machine.get('gpu') or machine.get('cpu')}, {machine['threads']} threads", markup=False
    )
