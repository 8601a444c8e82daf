"""``clicktrain bench step``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clicktrain.commands.arguments import Option
from clicktrain.commands.bench.benchmark import SPARSITY, Benchmark, Column, Result, ms, print_rows, times

if TYPE_CHECKING:
    from rich.console import Console


def _measure(given: Result, machine: Result, progress: Any) -> Result:
    from clicktrain.bench.step import StepCase, bench_step, to_json

    rows = bench_step(
        StepCase(given["model"], given["batch_size"], given["image_size"]),
        compressions=given["compression"],
        groups=given["group"],
        precisions=given["precision"],
        rounds=given["rounds"],
        compiled=given["compile"],
        bf16=given["bf16"],
        memory=given["memory"],
        rule=given["rule"],
        progress=progress,
    )
    return {"rows": to_json(rows)}


_COLUMNS: tuple[Column, ...] = (
    ("x", lambda row: f"{row['compression']:g}"),
    ("G", lambda row: str(row["group"])),
    ("sparse", lambda row: row["precision"]),
    ("activations", lambda row: "bf16" if row["activations"] == "bf16" else "fp32"),
    ("dense fp32 ms", lambda row: ms(row["dense_fp32_ms"], row["dense_fp32_name"])),
    ("dense bf16 ms", lambda row: ms(row["dense_bf16_ms"], row["dense_bf16_name"])),
    ("sparse ms", lambda row: ms(row["sparse_ms"])),
    ("over fp32", lambda row: times(row["ratio_fp32"])),
    ("over bf16", lambda row: times(row["ratio_bf16"])),
    ("dense MB", lambda row: _mb(row["dense_memory_mb"])),
    ("sparse MB", lambda row: _mb(row["sparse_memory_mb"])),
)


def _show(result: Result, console: Console) -> None:
    settings = result["settings"]
    title = (
        f"training step of {settings['model']}, batch {settings['batch_size']}, "
        f"{settings['image_size']} pixels, median of {settings['rounds']} rounds"
    )
    print_rows(console, title, _COLUMNS, result["rows"], left=4)
    console.print(
        "Forward, loss, backward and SGD with momentum. Dense: the fastest of its kind. Sparse: the "
        "accelerated packed network, loss and gradients checked against the packed reference. MB: peak of a "
        "step in the precision of the sparse one, in a process of its own, beyond what the libraries take.",
        markup=False,
        highlight=False,
    )


def _mb(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


STEP = Benchmark(
    "Time a whole training step: the accelerated packed network beside the fastest dense one.",
    (
        Option("model", str, "Network of the zoo.", "resnet18"),
        Option("batch_size", int, "Images per step.", 64, metavar="N"),
        Option("image_size", int, "Side of the images in pixels.", 32, metavar="N"),
        *SPARSITY,
        Option(
            "precision",
            tuple[str, ...],
            "Of the accelerated steps; bf16 runs under autocast and may keep activations in it.",
            ("fp32",),
            metavar="fp32|bf16 [...]",
        ),
        Option("rounds", int, "Timings of which the median is taken.", 7, metavar="N"),
        Option("rule", str, "How the compiler chooses operators: measured, density or sparse.", "measured"),
        Option(
            "compile",
            bool,
            "Also measure the dense network under torch.compile; takes a minute or two.",
            True,
        ),
        Option("bf16", bool, "Also measure dense steps under bfloat16 autocast.", True),
        Option("memory", bool, "Also measure the peak memory of a step.", True),
    ),
    _measure,
    _show,
)
