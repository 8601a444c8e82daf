"""``clicktrain cost RUN... --gpus N --link NAME``: what exchanging gradients would cost on many GPUs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clicktrain.commands.arguments import Command, Option, Positional, output_file
from clicktrain.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from clicktrain.cluster import Cluster, Fit, Projection
    from clicktrain.report.run_data import Run

_OPTIONS = (
    Option("gpus", tuple[int, ...], "GPUs in all.", (16, 32, 64, 128, 256, 512, 1024), metavar="N [N ...]"),
    Option("link", str, "Between machines: a name (ethernet-10g, ib-edr, ...) or numbers as in 25Gbit/s,5us.",
           "ib-edr", metavar="LINK"),
    Option("inside", str, "Between the GPUs of a machine, in the same way.", "nvlink", metavar="LINK"),
    Option("gpus_per_machine", int, "GPUs of a machine.", 8, metavar="N"),
    Option("adapters", int, "Links of a machine to others, which its GPUs share.", 1, metavar="N"),
    Option("batch_size", int | None, "Images of a GPU in an iteration; those of a process of the run by "
           "default, epoch by epoch.", metavar="N"),
    Option("tflops", float | None, "What a GPU computes in training, in 1e12 FLOPs a second; by default "
           "steps take as long as the run has measured."),
    Option("by_epoch", bool, "Print every epoch on the last number of GPUs.", False),
    Option("json", str | None, "Also write all of it to a file.", metavar="FILE"),
    Option("check", str | None, "Rows that 'clicktrain bench exchange --json FILE' has measured: fit latency "
           "and bandwidth of each link, and predict each row from the others.", metavar="FILE"),
)  # fmt: skip
COMMAND = Command(
    name="cost",
    description="Project the exchange of gradients of runs, finished or not, onto clusters: bytes that each "
    "GPU sends, time of the exchange, what of it the backward pass does not hide, and the time of training. "
    "Sizes are the run's own, epoch by epoch; a dense run of the same network and data gives the time of a "
    "dense step. docs/cost.md has the model.",
    positional=Positional("runs", "Folders of the runs.", many=True, optional=True),
    groups={"this command": _OPTIONS},
    examples=(
        "clicktrain cost runs/pruned runs/dense --gpus 128 --link ethernet-10g",
        "clicktrain cost runs/pruned --gpus 512 --link 25Gbit/s,5us --adapters 2 --json cost.json",
        "clicktrain cost --check exchange.json   # the model against 'clicktrain bench exchange --json FILE'",
    ),
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    given = {option.name: option.default for option in _OPTIONS} | COMMAND.parse(argv)
    if not given.get("runs") and given["check"] is None:
        raise UserError("RUNS is missing: write 'clicktrain cost RUN... [--gpus N ...] [--link NAME]'")
    target = None if given["json"] is None else output_file("--json", given["json"])
    for name in ("batch_size", "tflops"):
        if given[name] is not None and not given[name] > 0:
            raise UserError(f"{name} is {given[name]}: must be above 0")
    result: dict[str, Any] = {}
    fits, projections = [], []
    if given["check"] is not None:
        from clicktrain.cluster import fit_links, read_rows

        fits = fit_links(read_rows(given["check"]))
        result["check"] = [_fit_json(fit) for fit in fits]
    if given.get("runs"):
        projections = _project(given)
        result["runs"] = [
            {
                "run": str(one.folder),
                "method": one.method,
                "clusters": [cluster_json(projection) for projection in own],
            }
            for one, own in projections
        ]
    if target is not None:
        from clicktrain.formats.atomic import write_text_atomic

        write_text_atomic(target, json.dumps(result, indent=2) + "\n")
    from clicktrain.commands.screen import PipeConsole

    console = PipeConsole()
    for fit in fits:
        _show_fit(fit, console)
    for one, own in projections:
        _show(one, own, console)
        if given["by_epoch"]:
            _show_epochs(one, own[-1], console)
    return 0


def _project(given: dict[str, Any]) -> list[tuple[Run, list[Projection]]]:
    from clicktrain.cluster import project
    from clicktrain.report.run_data import read_runs

    runs = read_runs(given["runs"])
    clusters = _clusters(given)
    pruned = [one for one in runs if not one.is_dense] or list(runs)
    projected = []
    for one in pruned:
        dense = next((other for other in runs if other.is_dense and other.task == one.task), None)
        steps = [] if dense is None else [value for _, value in dense.column("step_ms_median")]
        try:
            own = [
                project(
                    one.metrics, one.summary, cluster, batch=given["batch_size"], tflops=given["tflops"],
                    dense_step_ms=statistics.median(steps) if steps else None, accumulate=one.accumulate,
                )
                for cluster in clusters
            ]  # fmt: skip
        except UserError as error:
            raise UserError(f"{one.folder}: {error}") from None
        projected.append((one, own))
    return projected


def _clusters(given: dict[str, Any]) -> list[Cluster]:
    from clicktrain.cluster import Cluster, parse_link

    inside, between = parse_link(given["inside"]), parse_link(given["link"])
    if not given["gpus"]:
        raise UserError("gpus names no number: write --gpus N")
    return [
        Cluster.of(
            gpus, per_machine=given["gpus_per_machine"], inside=inside, between=between,
            adapters=given["adapters"],
        )
        for gpus in given["gpus"]
    ]  # fmt: skip


def cluster_json(projection: Projection) -> dict[str, Any]:
    """A run on one cluster as plain values; times in milliseconds, of the run in seconds."""
    return {
        "gpus": projection.cluster.gpus,
        "cluster": str(projection.cluster),
        "bytes_saved": projection.bytes_saved,
        "bytes_saved_run": projection.bytes_saved_run,
        "exchange_saved": projection.exchange_saved,
        "exposed_saved": projection.exposed_saved,
        "seconds": projection.seconds,
        "dense_seconds": projection.dense_seconds if projection.dense_known else None,
        "epochs": [
            {
                "epoch": cost.epoch,
                "source": cost.source,
                "steps": cost.steps,
                "bytes_step": cost.bytes_step,
                "dense_bytes_step": cost.dense_bytes_step,
                "bytes_epoch": cost.bytes_epoch,
                "dense_bytes_epoch": cost.dense_bytes_step * cost.dense_steps,
                "seconds": cost.seconds,
                **{
                    f"{name}{key}_ms": 1e3 * value
                    for name, one in (("", cost.run), ("dense_", cost.dense), ("all_", cost.all_gradients))
                    for key, value in (
                        ("exchange", one.exchange), ("exposed", one.exposed), ("step", one.seconds),
                    )
                },
            }
            for cost in projection.epochs
        ],
    }  # fmt: skip


def _fit_json(fit: Fit) -> dict[str, Any]:
    return {
        "link": fit.link.name,
        "gbit_per_second": fit.link.bandwidth * 8 / 1e9,
        "latency_us": fit.link.latency * 1e6,
        "median_error": fit.median_error,
        "largest_error": fit.largest_error,
        "median_step_error": fit.median_step_error,
        "rows": [
            {
                "what": one.row.what,
                "processes": one.row.processes,
                "bytes_per_step": one.row.num_bytes,
                "exchange_ms": one.row.exchange_ms,
                "predicted_ms": one.predicted_ms,
                "error": one.error,
                "step_ms": one.row.step_ms,
                "predicted_step_ms": one.predicted_step_ms,
                "step_error": one.step_error,
            }
            for one in fit.rows
        ],
    }


def _show(one: Run, own: Sequence[Projection], console: Console) -> None:
    from clicktrain import wording
    from clicktrain.commands.bench import ms, print_rows

    used = {cost.source: _SOURCES[cost.source] for cost in own[0].epochs}
    last = own[-1].epochs[-1]
    head = f"{one.label}: {one.method_name}, {len(own[0].epochs)} epochs"
    console.print(head, markup=False, highlight=False, soft_wrap=True)
    print_rows(
        console,
        "MB that a GPU sends in a step",
        (
            ("GPUs", lambda p: str(p.cluster.gpus)),
            ("dense", lambda p: f"{p.epochs[0].dense_bytes_step / 1e6:.3g}"),
            ("last epoch", lambda p: f"{p.epochs[-1].bytes_step / 1e6:.3g}"),
            ("saved, mean", lambda p: wording.percent(p.bytes_saved)),
            ("saved in all", lambda p: wording.percent(p.bytes_saved_run)),
        ),
        own,
    )
    print_rows(
        console,
        "ms of exchange in a step of the last epoch, and training",
        (
            ("GPUs", lambda p: str(p.cluster.gpus)),
            ("dense", lambda p: ms(1e3 * p.epochs[-1].dense.exchange)),
            ("run", lambda p: ms(1e3 * p.epochs[-1].run.exchange)),
            ("waits: dense", lambda p: ms(1e3 * p.epochs[-1].dense.exposed) if p.dense_known else "-"),
            ("all sent", lambda p: ms(1e3 * p.epochs[-1].all_gradients.exposed)),
            ("run", lambda p: ms(1e3 * p.epochs[-1].run.exposed)),
            ("training: dense", lambda p: wording.short_duration(p.dense_seconds) if p.dense_known else "-"),
            ("run", lambda p: wording.short_duration(p.seconds)),
        ),
        own,
    )
    computes, dense = (1e3 * (step.seconds - step.exposed) for step in (last.run, last.dense))
    known = f"{ms(dense)} ms if dense" if own[-1].dense_known else (
        "dense steps were not measured: give a dense run of the same network and data as well"
    )  # fmt: skip
    for line in (
        f"cluster: {own[-1].cluster}",
        f"sizes: {'; '.join(used.values())}",
        f"a step computes {ms(computes)} ms in the last epoch, {known}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


_SOURCES = {
    "counted": "bytes counted at the collectives of the run",
    "gradients": "gradients of the parameters that the run stored",
    "masks": "positions that frozen masks keep",
}


def _show_epochs(one: Run, projection: Projection, console: Console) -> None:
    """PruneTrain's figure 11: bytes of an iteration and of an epoch, in percent of dense training."""
    from clicktrain import wording
    from clicktrain.commands.bench import ms, print_rows

    print_rows(
        console,
        f"{one.label} by epoch on {projection.cluster.gpus} GPUs",
        (
            ("epoch", lambda cost: f"{cost.epoch:g}"),
            ("MB a step", lambda cost: f"{cost.bytes_step / 1e6:.3g}"),
            ("of dense", lambda cost: wording.percent(cost.bytes_step / cost.dense_bytes_step)),
            ("GB an epoch", lambda cost: f"{cost.bytes_epoch / 1e9:.3g}"),
            (
                "of dense",
                lambda cost: wording.percent(cost.bytes_epoch / (cost.dense_bytes_step * cost.dense_steps)),
            ),
            ("exchange ms", lambda cost: ms(1e3 * cost.run.exchange)),
            ("exposed ms", lambda cost: ms(1e3 * cost.run.exposed)),
            ("step ms", lambda cost: ms(1e3 * cost.run.seconds)),
        ),
        projection.epochs,
    )


def _show_fit(fit: Fit, console: Console) -> None:
    from clicktrain.commands.bench import ms, print_rows

    print_rows(
        console,
        f"{fit.link}, as fitted on all rows; each row as predicted from the others",
        (
            ("what", lambda one: one.row.what),
            ("processes", lambda one: str(one.row.processes)),
            ("MB a step", lambda one: f"{one.row.num_bytes / 1e6:.3g}"),
            ("measured ms", lambda one: ms(one.row.exchange_ms)),
            ("predicted ms", lambda one: ms(one.predicted_ms)),
            ("error", lambda one: _error(one.error)),
            ("step ms", lambda one: ms(one.row.step_ms)),
            ("predicted", lambda one: ms(one.predicted_step_ms)),
            ("error", lambda one: _error(one.step_error)),
        ),
        fit.rows,
    )
    said = f"error: median {100 * fit.median_error:.0f}%, largest {100 * fit.largest_error:.0f}%"
    if fit.median_step_error is not None:
        said += f"; of steps, with the overlap: median {100 * fit.median_step_error:.0f}%"
    console.print(said, markup=False, highlight=False)


def _error(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.0f}%"
