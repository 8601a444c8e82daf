"""``clicktrain bench stages``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clicktrain.commands.arguments import Option
from clicktrain.commands.bench.benchmark import Benchmark, Result, print_table

if TYPE_CHECKING:
    from rich.console import Console


def _measure(given: Result, machine: Result, progress: Any) -> Result:
    from clicktrain.bench.stages import bench_stages, to_json
    from clicktrain.methods import ClickTrain
    from clicktrain.train.device import resolve_device

    rows = bench_stages(
        given["model"],
        method=ClickTrain(preset=given["preset"]),
        batch_size=given["batch_size"],
        image_size=given["image_size"],
        steps=given["steps"],
        device=str(resolve_device(given["device"])),
    )
    return {"rows": to_json(rows)}


def _show(result: Result, console: Console) -> None:
    settings = result["settings"]
    title = f"{settings['model']}, batch {settings['batch_size']}, preset {settings['preset']}"
    rows = [
        (
            row["stage"],
            str(row["steps"]),
            f"{row['dense_ms']:.1f}",
            f"{row['stage_ms']:.1f}",
            f"{row['ratio']:.3f}x",
        )
        for row in result["rows"]
    ]
    print_table(console, title, ("stage", "steps", "dense ms", "stage ms", "over dense"), rows)


BENCHMARK = Benchmark(
    "Time steps of ClickTrain's stages beside the dense step on the same batch.",
    (
        Option("model", str, "Network of the zoo.", "resnet18"),
        Option("preset", str, "Settings of ClickTrain: default, paper or one-shot.", "default"),
        Option("batch_size", int, "Images per step.", 64),
        Option("image_size", int, "Side of the images in pixels.", 32),
        Option("steps", int, "Measured steps per stage.", 7),
        Option("device", str, "cpu, cuda or mps.", "cpu"),
    ),
    _measure,
    _show,
)
