"""``clicktrain bench WHAT``: measurements side by side in one process."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from clicktrain.commands.arguments import Command, Option, Positional, output_file
from clicktrain.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

Result = dict[str, Any]
"""As it is written to a file."""


SPARSITY = (
    Option("compression", tuple[float, ...], "All weights over kept ones.", (4.0, 10.0), metavar="X [X ...]"),
    Option(
        "group", tuple[int, ...], "Neighboring filters that share their positions.", (1,), metavar="N [N ...]"
    ),
)
"""What is kept of the layers that are timed, for benchmarks of more than one sparsity."""
ROUNDS = Option("rounds", int, "Timings of which the median is taken.", 7, metavar="N")
PRECISION = Option(
    "precision",
    tuple[str, ...],
    "Of the accelerated steps; bf16 runs under autocast and may keep activations in it.",
    ("fp32",),
    metavar="fp32|bf16 [...]",
)
NETWORK = (
    Option("model", str, "Network of the zoo.", "resnet18"),
    Option("batch_size", int, "Images per step.", 64, metavar="N"),
    Option("image_size", int, "Side of the images in pixels.", 32, metavar="N"),
)
"""The network and images of a training step that is timed."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One thing that can be measured.

    Attributes:
        description: for ``--help``.
        options: its own flags.
        measure: (values of all flags, facts about the machine, a callback for progress) -> what stands beside
            "machine" and "settings" in the result. It may add facts about the machine.
        show: print the result for people.
    """

    description: str
    options: Sequence[Option]
    measure: Callable[[Result, Result, Callable[[str], None]], Result]
    show: Callable[[Result, Console], None]


Column = tuple[str, Callable[[Any], str]]
"""A heading, and the cell of a row of a result."""


def print_rows(
    console: Console, title: str, columns: Sequence[Column], rows: Sequence[Any], left: int = 1
) -> None:
    """Print a table with a line for each row of a result."""
    cells = [[cell(row) for _, cell in columns] for row in rows]
    print_table(console, title, [head for head, _ in columns], cells, left)


def print_table(
    console: Console,
    title: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: int = 1,
    *,
    whole_words: bool = False,
) -> None:
    """Print cells; the first ``left`` columns are words, the others numbers.

    ``whole_words``: in a narrow window long words go on in the next line instead of being cut.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for number, head in enumerate(heads):
        justify: Literal["left", "right"] = "left" if number < left else "right"
        table.add_column(head, justify=justify, overflow="fold" if whole_words else "ellipsis")
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)


def times(ratio: float | None) -> str:
    """A ratio as it is printed."""
    return "-" if ratio is None else f"{ratio:.2f}x"


def ms(value: float | None, name: str | None = None) -> str:
    """A time as it is printed, with the name of what took it."""
    if value is None:
        return "-"
    text = f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return f"{text} ({name})" if name else text


def percent(share: float | None) -> str:
    """A share as it is printed."""
    return "-" if share is None else f"{100 * share:.0f}%"


BENCHMARKS: dict[str, str] = {
    "stages": "what choosing patterns costs, against the dense step",
    "conv": "one sparse convolution layer against the best dense call",
    "pack": "packing a weight with known positions against its conversion to CSR",
    "step": "a whole accelerated training step against the best dense one",
    "runs": "networks of finished runs against the dense ones, in inference and training",
    "inference": "a pruned network in inference, beside the engines of others",
    "exchange": "what processes exchange in a training step, and how long that takes over slow links",
}
"""What can be measured. Each is a `Benchmark` of its name in capitals, in its own module or in `kernels`."""
_OWN_MODULES = ("runs", "inference", "exchange")

EXAMPLES: dict[str, str] = {
    "stages": " --model resnet18 --batch-size 64",
    "conv": " --compression 4 10 --threads 1",
    "pack": " --json pack.json",
    "step": " --model resnet18 --compression 8 --no-compile",
    "runs": " --runs runs/first --by-layer",
    "exchange": " --model resnet20 --processes 2 --links 1 0.1 --json exchange.json",
    "inference": " --model resnet18 --engine clicktrain torch --batch 1 64",
}
"""Flags that show what each is for."""

_SHARED = (
    Option("threads", int | None, "CPU threads; PyTorch's own choice by default.", metavar="N"),
    Option("json", str | None, "Also write the result to a file.", metavar="FILE"),
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    benchmark, given = settings_of(argv)
    name = given.pop("json")
    path = None if name is None else output_file("--json", name)
    result = _measure(benchmark, given)
    if path is not None:
        from clicktrain.formats.atomic import write_text_atomic

        write_text_atomic(path, json.dumps(result, indent=2) + "\n")
    _show(benchmark, result)
    return 0


def settings_of(argv: Sequence[str]) -> tuple[Benchmark, dict[str, Any]]:
    """The benchmark that a command line asks for, and the values of all its flags."""
    what, rest = _which(list(argv))
    benchmark, command = benchmark_called(what), command_of(what)
    defaults = {option.name: option.default for option in command.options.values()}
    return benchmark, defaults | command.parse(rest)


def benchmark_called(what: str) -> Benchmark:
    """One of `BENCHMARKS`."""
    home = what if what in _OWN_MODULES else "kernels"
    benchmark: Benchmark = getattr(importlib.import_module(f"clicktrain.commands.bench.{home}"), what.upper())
    return benchmark


def command_of(what: str) -> Command:
    """``clicktrain bench WHAT``."""
    benchmark = benchmark_called(what)
    return Command(
        f"bench {what}",
        benchmark.description,
        {"this command": (*benchmark.options, *_SHARED)},
        examples=(f"clicktrain bench {what}{EXAMPLES[what]}",),
    )


def commands() -> Sequence[Command]:
    """``clicktrain bench``, and each of the benchmarks."""
    return (_overview(), *map(command_of, BENCHMARKS))


def _which(argv: list[str]) -> tuple[str, list[str]]:
    what = next((word for word in argv if word in BENCHMARKS), None)
    if what is not None:
        argv.remove(what)
        return what, argv
    names = ", ".join(BENCHMARKS)
    if "-h" in argv or "--help" in argv:
        _overview().parse(["--help"])
    if not argv or argv[0].startswith("-"):
        raise UserError(
            f"WHAT is missing: write 'clicktrain bench WHAT [--flag value ...]', WHAT one of {names}"
        )
    near = difflib.get_close_matches(argv[0], BENCHMARKS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"use one of {names}"
    raise UserError(f"there is no benchmark '{argv[0]}': {hint}")


def _overview() -> Command:
    """The command without a benchmark."""
    lines = "; ".join(f"{name}: {text}" for name, text in BENCHMARKS.items())
    return Command(
        "bench",
        f"Time what the methods cost and give. {lines}. See 'clicktrain bench WHAT --help' for flags.",
        {"every benchmark": _SHARED},
        Positional("what", f"What to measure: {', '.join(BENCHMARKS)}."),
        examples=[f"clicktrain bench {what}{rest}" for what, rest in EXAMPLES.items()],
    )


def _measure(benchmark: Benchmark, given: dict[str, Any]) -> dict[str, Any]:
    import torch
    from rich.console import Console

    from clicktrain.latency.machine import describe
    from clicktrain.train.device import resolve_device

    threads = given["threads"]
    if threads is not None:
        if threads < 1:
            raise UserError(f"threads is {threads}: must be at least 1")
        torch.set_num_threads(threads)
    machine = describe(resolve_device(given.get("device", "cpu")))
    with Console(stderr=True).status("measuring") as status:
        tables = benchmark.measure(given, machine, status.update)
    return {"machine": machine, "settings": given, **tables}


def _show(benchmark: Benchmark, result: dict[str, Any]) -> None:
    from clicktrain.commands.screen import PipeConsole

    console = PipeConsole()
    benchmark.show(result, console)
    machine = result["machine"]
    where = machine["gpu"] or machine["cpu"]
    line = f"on {where}, {machine['threads']} threads, torch {machine['versions']['torch']}"
    console.print(line, markup=False, highlight=False)
