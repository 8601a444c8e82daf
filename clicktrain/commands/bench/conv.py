"""``clicktrain bench conv``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clicktrain.commands.arguments import Option
from clicktrain.commands.bench.benchmark import (
    SPARSITY,
    Benchmark,
    Column,
    Result,
    ms,
    percent,
    print_rows,
    print_table,
    times,
)

if TYPE_CHECKING:
    from rich.console import Console


def _measure(given: Result, machine: Result, progress: Any) -> Result:
    from clicktrain.bench import conv
    from clicktrain.bench.peak import measure_peak

    shapes = [conv.Shape.parse(text) for text in given["shapes"]] or conv.SHAPES
    peak = measure_peak()
    machine["peak_gflops"] = None if peak is None else peak.gflops
    machine["l1_read_gbs"] = None if peak is None else peak.l1_read_gbs
    machine["l2_read_gbs"] = None if peak is None else peak.l2_read_gbs
    rows = conv.bench_conv(
        shapes,
        compressions=given["compression"],
        groups=given["group"],
        precisions=given["precision"],
        rounds=given["rounds"],
        tune=given["tune"],
        compiled=given["compile"],
        bf16=given["bf16"],
        peak_gflops=machine["peak_gflops"],
        progress=progress,
    )
    return {
        "rows": conv.to_json(rows),
        "geomean": conv.geometric_means(rows),
        "geomean_bf16": conv.geometric_means_bf16(rows),
        "geomean_bound": conv.geometric_means_bound(rows),
    }


_COLUMNS: tuple[Column, ...] = (
    ("C,F,H,W,N", lambda row: ",".join(map(str, row["shape"]))),
    ("x", lambda row: f"{row['compression']:g}"),
    ("G", lambda row: str(row["group"])),
    ("sparse", lambda row: row["precision"]),
    ("phase", lambda row: row["phase"]),
    ("tiling", lambda row: _tiling(row["tiling"])),
    ("dense ms", lambda row: ms(row["dense_ms"], row["dense_name"])),
    ("bf16 ms", lambda row: ms(row["dense_bf16_ms"], row["dense_bf16_name"])),
    ("sparse ms", lambda row: ms(row["sparse_ms"])),
    ("ratio", lambda row: times(row["ratio"])),
    ("over bf16", lambda row: times(row["ratio_bf16"])),
    ("bound", lambda row: times(row["bound"])),
    ("peak", lambda row: percent(row["fraction_of_peak"])),
)


def _show(result: Result, console: Console) -> None:
    settings = result["settings"]
    title = f"3x3 convolutions, median of {settings['rounds']} rounds"
    print_rows(console, title, _COLUMNS, result["rows"], left=6)
    low, bound = result["geomean_bf16"], result["geomean_bound"]
    cells = [
        (key, times(value), times(low.get(key)), times(bound[key]))
        for key, value in result["geomean"].items()
    ]
    print_table(console, "geometric means", ("", "ratio", "over bf16", "bound"), cells)
    tiled = "the fastest one of those that fit" if settings["tune"] else "chosen by rule"
    caption = (
        "Dense: the fastest PyTorch call, its inputs in its layout and type already. Sparse: the operator "
        "as networks call it, on activations that are blocked already; all results checked against float64. "
        "Tiling (rows x columns, in regions of r x c tiles, filters; indexed: n channels "
        f"in one pass; cache_blocked: n results by n sources): {tiled}. Bound: the ratio of a "
        "layer that did nothing but its multiply-adds from registers and then one pass over what it reads "
        "and writes, both timed beside the calls. Peak: "
        "multiply-adds of kept weights inside the image, over what the threads reach from registers"
    )
    machine = result["machine"]
    if machine["peak_gflops"] is not None:
        caption += (
            f" ({machine['peak_gflops']:.0f} GFLOP/s; reads {machine['l1_read_gbs']:.0f} GB/s from L1, "
            f"{machine['l2_read_gbs']:.0f} GB/s from L2)"
        )
    console.print(caption + ".", markup=False, highlight=False)


def _tiling(tiling: Result) -> str:
    tile, region = ("x".join(map(str, tiling[key])) for key in ("tile", "region"))
    filters = f" by {tiling['filters_per_tile']}" if tiling["filters_per_tile"] > 1 else ""
    sources, results = (tiling[key] or "all" for key in ("sources", "results"))
    code = {
        "indexed": f", indexed {sources}",
        "cache_blocked": f", cache_blocked {results} by {sources}",
    }.get(tiling["code"], "")
    pairs = " in pairs" if tiling["pairs"] else ""
    return f"{tile} in {region}{filters}{code}{pairs}"


CONV = Benchmark(
    "Time 3x3 convolutions forward and backward: the sparse operators beside the fastest dense call.",
    (
        Option(
            "shapes",
            tuple[str, ...],
            "Layers as CHANNELS,SIZE,BATCH or C,F,H,W,N; those of ResNet-18 by default.",
            (),
            metavar="C,SIZE,N [C,SIZE,N ...]",
        ),
        *SPARSITY,
        Option(
            "precision",
            tuple[str, ...],
            "What the sparse operators' activations are kept in; bf16 is summed up in fp32.",
            ("fp32",),
            metavar="fp32|bf16 [...]",
        ),
        Option("rounds", int, "Timings of which the median is taken.", 7, metavar="N"),
        Option("tune", bool, "Measure the sparse kernels' tilings and take the best.", True),
        Option(
            "compile",
            bool,
            "Also measure dense calls under torch.compile: for a single convolution it gains nothing and "
            "takes a minute.",
            False,
        ),
        Option("bf16", bool, "Also measure dense calls in bfloat16.", True),
    ),
    _measure,
    _show,
)
