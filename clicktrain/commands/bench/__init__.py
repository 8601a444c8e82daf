"""``clicktrain bench WHAT``: measurements side by side in one process."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clicktrain.commands.arguments import Command, Option, Positional
from clicktrain.commands.bench.benchmark import Benchmark
from clicktrain.errors import UserError

BENCHMARKS: dict[str, str] = {
    "stages": "what choosing patterns costs, against the dense step",
    "conv": "one sparse convolution layer against the best dense call",
    "pack": "packing a weight with known positions against its conversion to CSR",
    "step": "a whole accelerated training step against the best dense one",
    "runs": "networks of finished runs against the dense ones, in inference and training",
}
"""What can be measured. Each is a `Benchmark` of its name in capitals, in `runs` or `kernels`."""

_SHARED = (
    Option("threads", int | None, "CPU threads; PyTorch's own choice by default.", metavar="N"),
    Option("json", str | None, "Also write the result to a file.", metavar="FILE"),
)


def run(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    what, rest = _which(list(argv))
    home = "runs" if what == "runs" else "kernels"
    module = importlib.import_module(f"clicktrain.commands.bench.{home}")
    benchmark: Benchmark = getattr(module, what.upper())
    options = (*benchmark.options, *_SHARED)
    command = Command(f"bench {what}", benchmark.description, {"this command": options})
    given = {option.name: option.default for option in options}
    given.update(command.parse(rest))
    path = _writable(given.pop("json"))
    result = _measure(benchmark, given)
    if path is not None:
        from clicktrain.formats.atomic import write_text_atomic

        write_text_atomic(path, json.dumps(result, indent=2) + "\n")
    _show(benchmark, result)
    return 0


def _which(argv: list[str]) -> tuple[str, list[str]]:
    what = next((word for word in argv if word in BENCHMARKS), None)
    if what is not None:
        argv.remove(what)
        return what, argv
    names = ", ".join(BENCHMARKS)
    if "-h" in argv or "--help" in argv:
        lines = "; ".join(f"{name}: {text}" for name, text in BENCHMARKS.items())
        Command(
            "bench",
            f"Time what the methods cost and give. {lines}. See 'clicktrain bench WHAT --help' for flags.",
            {"every benchmark": _SHARED},
            Positional("what", f"What to measure: {names}."),
        ).parse(["--help"])
    if not argv or argv[0].startswith("-"):
        raise UserError(
            f"WHAT is missing: write 'clicktrain bench WHAT [--flag value ...]', WHAT one of {names}"
        )
    near = difflib.get_close_matches(argv[0], BENCHMARKS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"use one of {names}"
    raise UserError(f"there is no benchmark '{argv[0]}': {hint}")


def _writable(name: str | None) -> Path | None:
    """The file for the result, checked before minutes of measuring."""
    path = None if name is None else Path(name)
    if path is not None and path.is_dir():
        raise UserError(f"--json {name} is a folder: give the name of a file")
    if path is not None and not path.parent.is_dir():
        raise UserError(f"--json {name}: there is no folder {path.parent}")
    return path


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
