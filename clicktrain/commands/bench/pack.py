"""``clicktrain bench pack``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clicktrain.commands.arguments import Option
from clicktrain.commands.bench.benchmark import Benchmark, Result, print_table, times

if TYPE_CHECKING:
    from rich.console import Console


def _measure(given: Result, machine: Result, progress: Any) -> Result:
    from clicktrain.bench.pack import bench_pack, to_json

    rows = bench_pack(
        given["filters"], given["channels"], sparsities=given["sparsity"], rounds=given["rounds"]
    )
    return {"rows": to_json(rows)}


def _show(result: Result, console: Console) -> None:
    heads = (
        "case",
        "density",
        "pack us",
        "to_sparse_csr us",
        "masked_select us",
        "over CSR",
        "over masked_select",
    )
    rows = [
        (
            row["case"],
            f"{row['density']:.3f}",
            *(f"{1e3 * row[key]:.1f}" for key in ("pack_ms", "csr_ms", "masked_select_ms")),
            times(row["ratio"]),
            times(row["ratio_masked_select"]),
        )
        for row in result["rows"]
    ]
    rounds = result["settings"]["rounds"]
    print_table(console, f"kept values of a dense weight, median of {rounds} rounds", heads, rows)


BENCHMARK = Benchmark(
    "Time the refresh of packed values from a dense 3x3 weight with fixed positions beside to_sparse_csr.",
    (
        Option("filters", int, "Filters of the weight.", 256, metavar="N"),
        Option("channels", int, "Channels of the weight.", 128, metavar="N"),
        Option("sparsity", tuple[float, ...], "Shares of zeros.", (0.75, 0.9), metavar="X [X ...]"),
        Option("rounds", int, "Timings of which the median is taken.", 15, metavar="N"),
    ),
    _measure,
    _show,
)
