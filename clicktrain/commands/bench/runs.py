"""``clicktrain bench runs``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clicktrain.commands.arguments import OWN_MODEL, Option
from clicktrain.commands.bench import (
    ROUNDS,
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
    from clicktrain.bench import layers
    from clicktrain.bench.runs import bench_runs, to_json

    if given["by_layer"]:
        layers.check_pruned(given["runs"], given["model"])
    common = {"rounds": given["rounds"], "model": given["model"], "progress": progress}
    rows = bench_runs(given["runs"], batch_sizes=given["batch_size"], bf16=given["bf16"], **common)
    tables = layers.bench_layers(rows, **common) if given["by_layer"] else []
    return {"rows": to_json(rows), "by_layer": layers.to_json(tables)}


_COLUMNS: tuple[Column, ...] = (
    ("run", lambda row: row["run"]),
    ("what", lambda row: row["what"]),
    ("batch", lambda row: str(row["batch_size"])),
    ("dense ms", lambda row: ms(row["dense_ms"], row["dense_name"])),
    ("pruned ms", lambda row: ms(row["pruned_ms"], row["pruned_name"])),
    ("faster", lambda row: times(row["ratio"])),
    ("FLOPs", lambda row: percent(row["flops_ratio"])),
    ("time / FLOPs saved", lambda row: _share(row["share_of_saving"])),
)


def _show(result: Result, console: Console) -> None:
    title = f"networks of finished runs, median of {result['settings']['rounds']} rounds"
    print_rows(console, title, _COLUMNS, result["rows"], left=2)
    console.print(
        "Dense: the network as it was before pruning. Each in its fastest memory order and precision; pruned "
        "ones with masks also on the sparse kernels. The last column is the share of time saved over the "
        "share of FLOPs saved.",
        markup=False,
        highlight=False,
    )
    for table in result["by_layer"]:
        _show_layers(table, console)
    _show_side_by_side(result["by_layer"], console)


def _show_layers(table: Result, console: Console) -> None:
    heads = ("layer", "outputs x inputs", "FLOPs left", "of all FLOPs", "dense ms", "of all time",
             "pruned ms", "time / FLOPs saved", "ms over")  # fmt: skip
    gated = any(row["gates"] for row in table["layers"])
    rows = [
        (
            row["layer"],
            _shapes(row),
            percent(row["pruned_flops"] / max(row["dense_flops"], 1)),
            percent(row["flops_share"]),
            _fine(row["dense_ms"]),
            percent(row["time_share"]),
            row["note"].partition(":")[0] if row["note"] else _with_gates(row),
            _share(row["share_of_saving"]),
            _over(row["excess_ms"]),
        )
        for row in table["layers"]
    ]
    rest = (
        ("everything else", "", "", "", _fine(table["dense_rest_ms"]),
         percent(table["dense_rest_ms"] / table["dense_ms"]), _fine(table["pruned_rest_ms"]),
         _share(table["rest_share_of_saving"]), _over(table["rest_excess_ms"])),
        ("whole", "", percent(table["flops_ratio"]), "100%", _fine(table["dense_ms"]), "100%",
         _fine(table["pruned_ms"]), "", ""),
    )  # fmt: skip
    what = f"{table['run']}: {table['what']}, batch {table['batch_size']}"
    names = f"dense in {table['dense_name']}, pruned in {table['pruned_name']}"
    title = f"{what}, layer by layer ({names})"
    print_table(console, title, heads, [*rows, *rest], left=2, whole_words=True)
    console.print(_at_fault(table), markup=False, highlight=False)
    if gated:
        console.print(_GATES, markup=False, highlight=False)


_GATES = (
    "In brackets: what of pruned ms the select in front of the layer and the scatter behind it take (channel "
    "gating), timed by themselves."
)

_SIDE = (
    "Side by side: outputs x inputs of a layer, ms, and in brackets what of these select and scatter take."
)


def _with_gates(row: Result) -> str:
    """The time of a layer, and what its gates take of it."""
    whole = _fine(row["pruned_ms"])
    return f"{whole} ({_fine(row['gate_ms'])})" if row["gates"] and row["gate_ms"] is not None else whole


def _show_side_by_side(tables: Sequence[Result], console: Console) -> None:
    """Layers of several runs of one network doing one thing: gating beside union (PruneTrain, figure 7)."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for table in tables:
        layers = tuple((row["layer"], *row["dense_shape"], *row["dense_input"]) for row in table["layers"])
        groups.setdefault((table["what"], table["batch_size"], layers), []).append(table)
    for (what, batch, _), group in groups.items():
        if len(group) < 2:
            continue
        rows = [
            (rows[0]["layer"], _fine(sum(row["dense_ms"] for row in rows) / len(rows)),
             *(f"{_outputs(row)}: {row['note'].partition(':')[0] or _with_gates(row)}" for row in rows))
            for rows in zip(*(table["layers"] for table in group), strict=True)
        ]  # fmt: skip
        whole = ("everything else", _fine(sum(table["dense_rest_ms"] for table in group) / len(group)),
                 *(_fine(table["pruned_rest_ms"]) for table in group))  # fmt: skip
        heads = ("layer", "dense ms", *(table["run"] for table in group))
        print_table(console, f"{what}, batch {batch}", heads, [*rows, whole], left=1, whole_words=True)
        console.print(_SIDE, markup=False, highlight=False)


def _outputs(row: Result) -> str:
    shape = row["pruned_shape"] or row["dense_shape"]
    return f"{shape[0]}x{shape[1]}"


def _at_fault(table: Result) -> str:
    """Where most of the time is that FLOPs would have let go."""
    over = [(row["excess_ms"], row["layer"]) for row in table["layers"] if row["excess_ms"] is not None]
    if table["rest_excess_ms"] is not None:
        over.append((table["rest_excess_ms"], "everything else"))
    worst = [f"{name} ({_over(ms)} ms)" for ms, name in sorted(over, reverse=True)[:3] if ms > 0]
    most = f"Most of it: {', '.join(worst)}. " if worst else ""
    return (
        "ms over: what is taken beyond the dense time times the FLOPs that are left (everything else: of the "
        f"whole network). {most}A layer is timed alone, everything else is the whole less its layers."
    )


def _shapes(row: Result) -> str:
    shapes = row["dense_shape"], row["pruned_shape"]
    before, after = (None if shape is None else f"{shape[0]}x{shape[1]}" for shape in shapes)
    return str(before) if after in (None, before) else f"{before} -> {after}"


def _fine(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{3 if abs(value) < 10 else 1}f}"


def _over(value: float | None) -> str:
    return _fine(value, "+")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


RUNS = Benchmark(
    "Time the networks of finished runs beside the dense ones: inference and a training step.",
    (
        Option("runs", tuple[str, ...], "Folders of finished runs.", (), metavar="RUN [RUN ...]"),
        OWN_MODEL,
        Option("batch_size", tuple[int, ...], "Images per call.", (64,), metavar="N [N ...]"),
        ROUNDS,
        Option("bf16", bool, "Also try everything dense under bfloat16 autocast.", False),
        Option(
            "by_layer",
            bool,
            "Also time every convolution and linear layer, dense and pruned, with the "
            "select and scatter of channel gating; several runs side by side.",
            False,
        ),
    ),
    _measure,
    _show,
)
