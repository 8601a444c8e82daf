"""``clicktrain bench inference``: a pruned network on this package's engines, and on those of others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clicktrain.commands.arguments import Option
from clicktrain.commands.bench import SPARSITY, Benchmark, Column, Result, ms, print_rows, times

if TYPE_CHECKING:
    from rich.console import Console


def _measure(given: Result, machine: Result, progress: Any) -> Result:
    import torch

    from clicktrain.bench.inference import ENGINES, bench_inference
    from clicktrain.bench.timing import to_json

    threads = given["threads"] or 1
    torch.set_num_threads(threads)
    machine["threads"] = threads
    rows, missing = bench_inference(
        given["model"],
        compressions=given["compression"],
        groups=given["group"],
        batches=given["batch"],
        threads=threads,
        engines=given["engine"] or tuple(ENGINES),
        precisions=given["precision"],
        image_size=given["image_size"],
        rounds=given["rounds"],
        progress=progress,
    )
    return {"rows": to_json(rows), "not_measured": to_json(missing)}


_COLUMNS: tuple[Column, ...] = (
    ("engine", lambda row: row["engine"]),
    ("precision", lambda row: row["precision"]),
    ("x", lambda row: f"{row['compression']:g}"),
    ("G", lambda row: str(row["group"])),
    ("batch", lambda row: str(row["batch"])),
    ("ms", lambda row: ms(row["ms"])),
    ("over the best that computes zeros", lambda row: times(row["ratio"])),
    ("error", lambda row: f"{row['max_error']:.1e}"),
)


def _show(result: Result, console: Console) -> None:
    settings, rows = result["settings"], result["rows"]
    title = (
        f"inference of {settings['model']}, {settings['image_size']} pixels, "
        f"medians of up to {settings['rounds']} rounds"
    )
    order = {name: place for place, name in enumerate(dict.fromkeys(row["engine"] for row in rows))}
    rows = sorted(rows, key=lambda row: (row["compression"], row["batch"], order[row["engine"]]))
    print_rows(console, title, _COLUMNS, rows, left=2)
    for one in result["not_measured"]:
        where = f", batch {one['batch']}" if one["batch"] else ""
        console.print(
            f"not measured: {one['engine']} in {one['precision']}{where}: {one['reason']}",
            markup=False,
            highlight=False,
        )


INFERENCE = Benchmark(
    "Time a pruned network in inference: this package's engines beside PyTorch, ONNX Runtime and OpenVINO, "
    "as far as they are installed (pip install 'clicktrain[bench]').",
    (
        Option("model", str, "Network of the zoo.", "resnet18"),
        Option("image_size", int, "Side of the images in pixels.", 32, metavar="N"),
        Option("batch", tuple[int, ...], "Images per call.", (1, 16, 64), metavar="N [N ...]"),
        *SPARSITY,
        Option(
            "engine",
            tuple[str, ...],
            "clicktrain-c, clicktrain, torch, torch-compile, onnxruntime, openvino; all by default.",
            (),
            metavar="NAME [...]",
        ),
        Option(
            "precision",
            tuple[str, ...],
            "That engines compute in, as far as they can.",
            ("fp32", "bf16", "int8"),
            metavar="fp32|bf16|int8 [...]",
        ),
        Option(
            "rounds",
            int,
            "Timings of which the median is taken, at most; fewer where those of one batch take more than "
            "half a minute.",
            31,
            metavar="N",
        ),
    ),
    _measure,
    _show,
)
