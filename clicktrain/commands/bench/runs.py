"""``clicktrain bench runs``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clicktrain.commands.arguments import Option
from clicktrain.commands.bench.benchmark import Benchmark, Result, ms, print_table, times

if TYPE_CHECKING:
    from rich.console import Console


def _measure(given: Result, machine: Result, progress: Any) -> Result:
    from clicktrain.bench.runs import bench_runs, to_json

    rows = bench_runs(
        given["runs"],
        batch_sizes=given["batch_size"],
        rounds=given["rounds"],
        bf16=given["bf16"],
        progress=progress,
    )
    return {"rows": to_json(rows)}


def _show(result: Result, console: Console) -> None:
    heads = ("run", "what", "batch", "dense ms", "pruned ms", "faster", "FLOPs", "time / FLOPs saved")
    rows = [
        (
            row["run"],
            row["what"],
            str(row["batch_size"]),
            ms(row["dense_ms"], row["dense_name"]),
            ms(row["pruned_ms"], row["pruned_name"]),
            times(row["ratio"]),
            f"{100 * row['flops_ratio']:.0f}%",
            "-" if row["share_of_saving"] is None else f"{row['share_of_saving']:.2f}",
        )
        for row in result["rows"]
    ]
    title = f"networks of finished runs, median of {result['settings']['rounds']} rounds"
    print_table(console, title, heads, rows, left=2)
    console.print(
        "Dense: the network as it was before pruning. Each in its fastest memory order and precision; pruned "
        "ones with masks also on the sparse kernels. The last column is the share of time saved over the "
        "share of FLOPs saved.",
        markup=False,
        highlight=False,
    )


BENCHMARK = Benchmark(
    "Time the networks of finished runs beside the dense ones: inference and a training step.",
    (
        Option("runs", tuple[str, ...], "Folders of finished runs.", (), metavar="RUN [RUN ...]"),
        Option("batch_size", tuple[int, ...], "Images per call.", (64,), metavar="N [N ...]"),
        Option("rounds", int, "Timings of which the median is taken.", 7, metavar="N"),
        Option("bf16", bool, "Also try everything dense under bfloat16 autocast.", False),
    ),
    _measure,
    _show,
)
