"""``clicktrain bench stages`` and ``clicktrain bench pack``: what choosing and packing masks costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clicktrain.commands.arguments import Option
from clicktrain.commands.bench.benchmark import Benchmark, Column, Result, print_rows, times

if TYPE_CHECKING:
    from rich.console import Console


def _measure_stages(given: Result, machine: Result, progress: Any) -> Result:
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


_STAGE_COLUMNS: tuple[Column, ...] = (
    ("stage", lambda row: row["stage"]),
    ("steps", lambda row: str(row["steps"])),
    ("dense ms", lambda row: f"{row['dense_ms']:.1f}"),
    ("stage ms", lambda row: f"{row['stage_ms']:.1f}"),
    ("over dense", lambda row: f"{row['ratio']:.3f}x"),
)


def _show_stages(result: Result, console: Console) -> None:
    settings = result["settings"]
    title = f"{settings['model']}, batch {settings['batch_size']}, preset {settings['preset']}"
    print_rows(console, title, _STAGE_COLUMNS, result["rows"])


STAGES = Benchmark(
    "Time steps of ClickTrain's stages beside the dense step on the same batch.",
    (
        Option("model", str, "Network of the zoo.", "resnet18"),
        Option("preset", str, "Settings of ClickTrain: default, paper or one-shot.", "default"),
        Option("batch_size", int, "Images per step.", 64),
        Option("image_size", int, "Side of the images in pixels.", 32),
        Option("steps", int, "Measured steps per stage.", 7),
        Option("device", str, "cpu, cuda or mps.", "cpu"),
    ),
    _measure_stages,
    _show_stages,
)


def _measure_pack(given: Result, machine: Result, progress: Any) -> Result:
    from clicktrain.bench.pack import bench_pack, to_json

    rows = bench_pack(
        given["filters"], given["channels"], sparsities=given["sparsity"], rounds=given["rounds"]
    )
    return {"rows": to_json(rows)}


_PACK_COLUMNS: tuple[Column, ...] = (
    ("case", lambda row: row["case"]),
    ("density", lambda row: f"{row['density']:.3f}"),
    ("pack us", lambda row: f"{1e3 * row['pack_ms']:.1f}"),
    ("to_sparse_csr us", lambda row: f"{1e3 * row['csr_ms']:.1f}"),
    ("masked_select us", lambda row: f"{1e3 * row['masked_select_ms']:.1f}"),
    ("over CSR", lambda row: times(row["ratio"])),
    ("over masked_select", lambda row: times(row["ratio_masked_select"])),
)


def _show_pack(result: Result, console: Console) -> None:
    title = f"kept values of a dense weight, median of {result['settings']['rounds']} rounds"
    print_rows(console, title, _PACK_COLUMNS, result["rows"])


PACK = Benchmark(
    "Time the refresh of packed values from a dense 3x3 weight with fixed positions beside to_sparse_csr.",
    (
        Option("filters", int, "Filters of the weight.", 256, metavar="N"),
        Option("channels", int, "Channels of the weight.", 128, metavar="N"),
        Option("sparsity", tuple[float, ...], "Shares of zeros.", (0.75, 0.9), metavar="X [X ...]"),
        Option("rounds", int, "Timings of which the median is taken.", 15, metavar="N"),
    ),
    _measure_pack,
    _show_pack,
)
