"""``clicktrain bench exchange``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clicktrain.commands.arguments import Option
from clicktrain.commands.bench import Benchmark, Column, Result, ms, percent, print_rows

if TYPE_CHECKING:
    from rich.console import Console


def _measure(given: Result, machine: Result, progress: Any) -> Result:
    from clicktrain.bench.exchange.measure import (
        ExchangeCase,
        bench_exchange,
        check_targets,
        sentences,
        to_json,
    )

    case = ExchangeCase(
        model=given["model"],
        batch_size=given["batch_size"],
        image_size=given["image_size"],
        compressions=given["compression"],
        reconfigurations=given["reconfigurations"],
        threads=given["threads"],
    )
    rows = bench_exchange(
        case,
        processes=given["processes"],
        links=given["links"],
        rounds=given["rounds"],
        slowed=given["slowed"],
        progress=progress,
    )
    return {
        "rows": to_json(rows),
        "targets": check_targets(case, rows),
        "overlap": sentences(case, rows),
    }


_COLUMNS: tuple[Column, ...] = (
    ("what", lambda row: row["what"]),
    ("link", lambda row: row["link"]),
    ("MB", lambda row: f"{row['bytes_per_step'] / 1e6:.2f}"),
    ("exchange", lambda row: ms(row["exchange_ms"])),
    ("step", lambda row: ms(row["step_ms"])),
    ("compute", lambda row: ms(row["compute_ms"])),
    ("hidden", lambda row: percent(row["hidden"])),
)
_HOWS = {
    "tc": "slow links are virtual Ethernet that tc slows down",
    "token bucket": "on slow links all-reduces wait for tokens (this machine permits no tc)",
}


def _show(result: Result, console: Console) -> None:
    settings, rows = result["settings"], result["rows"]
    for processes in settings["processes"]:
        title = (
            f"training step of {settings['model']} in {processes} processes, {settings['batch_size']} images "
            f"of {settings['image_size']} pixels in each, ms, median of {settings['rounds']} rounds"
        )
        print_rows(console, title, _COLUMNS, [row for row in rows if row["processes"] == processes], left=2)
    hows = [text for how, text in _HOWS.items() if any(row["how"] == how for row in rows)]
    lines = [
        "MB: gradients that each process hands to collectives, counted there. Exchange: these messages with "
        "nothing else going on. Compute: forward and backward pass in all processes at once, without "
        "exchange. Hidden: share of the exchange that goes on while the processes compute. "
        + "".join(f"{text[0].upper()}{text[1:]}." for text in hows),
        *(f"{line}." for line in result["overlap"]),
    ]
    for row in result["targets"]:
        met = "met" if row["met"] else "missed"
        lines.append(f"{row['what']}: {row['reached']:.3f}, wanted {row['wanted']:.3f}, {met}.")
    for line in lines:
        console.print(line, markup=False, highlight=False)


EXCHANGE = Benchmark(
    "Time training steps of several processes on this machine, over loopback and over slower links.",
    (
        Option("model", str, "Network of the zoo.", "vgg11"),
        Option("batch_size", int, "Images of each process.", 8, metavar="N"),
        Option("image_size", int, "Side of the images in pixels.", 32, metavar="N"),
        Option("processes", tuple[int, ...], "Numbers of processes.", (2, 4), metavar="N [N ...]"),
        Option(
            "links",
            tuple[str, ...],
            "loopback, and rates in Gbit/s of each direction.",
            ("loopback", "10", "1", "0.1"),
            metavar="LINK [LINK ...]",
        ),
        Option(
            "compression",
            tuple[float, ...],
            "All weights over kept ones; the last one also for masked dense weights and RigL.",
            (4.0, 10.0),
            metavar="X [X ...]",
        ),
        Option(
            "reconfigurations",
            tuple[int, ...],
            "How often PruneTrain's networks have lost 15% of their channels.",
            (3,),
            metavar="K [K ...]",
        ),
        Option("rounds", int, "Timings of which the median is taken.", 3, metavar="N"),
        Option(
            "slowed",
            str,
            "How links are slowed down: tc (virtual Ethernet between network namespaces), token-bucket "
            "(all-reduces wait), or auto: tc where the machine permits it.",
            "auto",
            metavar="auto|tc|token-bucket",
        ),
    ),
    _measure,
    _show,
)
