"""What sparse operators save and what choosing and packing masks costs: bench conv, step, stages, pack."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from clicktrain.commands.arguments import Option
from clicktrain.commands.bench import (
    NETWORK,
    PRECISION,
    ROUNDS,
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
        *NETWORK,
        Option("preset", str, "Settings of ClickTrain: default, paper or one-shot.", "default"),
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
    "Time the refresh of packed values from a dense 3x3 weight with frozen masks beside to_sparse_csr.",
    (
        Option("filters", int, "Filters of the weight.", 256, metavar="N"),
        Option("channels", int, "Channels of the weight.", 128, metavar="N"),
        Option("sparsity", tuple[float, ...], "Shares of zeros.", (0.75, 0.9), metavar="X [X ...]"),
        replace(ROUNDS, default=15),
    ),
    _measure_pack,
    _show_pack,
)


def _measure_conv(given: Result, machine: Result, progress: Any) -> Result:
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
        "geomean_bf16": conv.geometric_means(rows, "ratio_bf16"),
        "geomean_bound": conv.geometric_means(rows, "bound"),
    }


_CONV_COLUMNS: tuple[Column, ...] = (
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


def _show_conv(result: Result, console: Console) -> None:
    settings = result["settings"]
    title = f"3x3 convolutions, median of {settings['rounds']} rounds"
    print_rows(console, title, _CONV_COLUMNS, result["rows"], left=6)
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
    codes = {"indexed": f", indexed {sources}", "cache_blocked": f", cache_blocked {results} by {sources}"}
    code = codes.get(tiling["code"], "")
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
        replace(
            PRECISION, help="What the sparse operators' activations are kept in; bf16 is summed up in fp32."
        ),
        ROUNDS,
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
    _measure_conv,
    _show_conv,
)


def _measure_step(given: Result, machine: Result, progress: Any) -> Result:
    from clicktrain.bench.step import StepCase, bench_step, to_json

    rows = bench_step(
        StepCase(given["model"], given["batch_size"], given["image_size"], width=given["width"]),
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


_STEP_COLUMNS: tuple[Column, ...] = (
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


def _show_step(result: Result, console: Console) -> None:
    settings = result["settings"]
    width = "" if settings["width"] == 1 else f", width {settings['width']:g}"
    title = (
        f"training step of {settings['model']}{width}, batch {settings['batch_size']}, "
        f"{settings['image_size']} pixels, median of {settings['rounds']} rounds"
    )
    print_rows(console, title, _STEP_COLUMNS, result["rows"], left=4)
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
        *NETWORK,
        Option("width", float, "Factor on all channels of the network.", 1.0, metavar="X"),
        *SPARSITY,
        PRECISION,
        ROUNDS,
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
    _measure_step,
    _show_step,
)
