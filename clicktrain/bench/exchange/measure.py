"""Bytes and time of the exchange in a training step, and of the step, over links of several speeds."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clicktrain.bench.exchange.children import termination_as_exit
from clicktrain.bench.exchange.links import Link, unshare_command
from clicktrain.bench.exchange.networks import GROWS, names
from clicktrain.bench.masks import check_sparsity
from clicktrain.bench.step import StepCase
from clicktrain.bench.timing import Progress, check_rounds
from clicktrain.errors import UserError

SLOWED = ("auto", "tc", "token-bucket")
"""How links are slowed down: by the kernel where that is permitted, else by waiting; or one of the two."""


@dataclass(frozen=True, slots=True)
class ExchangeCase:
    """What is trained.

    Attributes:
        model: of the zoo, or ``package.module:factory``.
        batch_size: images of each process.
        compressions: of ClickTrain's networks; the last one also of the masked dense one, and of RigL's.
        reconfigurations: of PruneTrain's networks.
        threads: of each process; by default the machine's cores divided among them.
    """

    model: str = "vgg11"
    batch_size: int = 8
    image_size: int = 32
    compressions: tuple[float, ...] = (4.0, 10.0)
    reconfigurations: tuple[int, ...] = (3,)
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class ExchangeRow:
    """One network, one number of processes, one link.

    Attributes:
        link, how: its name, and ``as it is``, ``tc`` or ``token bucket``.
        bytes_per_step, calls_per_step: of gradients, that each process hands to collectives.
        exchange_ms: of these messages, with nothing else going on; a median, as all times.
        step_ms: of a training step, with its exchange; ``step_ms_range`` the fastest and the slowest.
        compute_ms: of a forward and backward pass in all processes, without exchange.
    """

    what: str
    processes: int
    link: str
    how: str
    bytes_per_step: int
    calls_per_step: int
    exchange_ms: float
    step_ms: float
    step_ms_range: tuple[float, float]
    compute_ms: float

    @property
    def hidden(self) -> float:
        """Share of the exchange that goes on while the processes compute."""
        return min(max((self.exchange_ms + self.compute_ms - self.step_ms) / self.exchange_ms, 0.0), 1.0)


def bench_exchange(
    case: ExchangeCase,
    *,
    processes: Sequence[int] = (2, 4),
    links: Sequence[str] = ("loopback", "10", "1", "0.1"),
    rounds: int = 3,
    slowed: str = "auto",
    progress: Progress = lambda text: None,
) -> list[ExchangeRow]:
    """Time training steps of several processes on this machine, over loopback and over slower links.

    Links are given in Gbit/s of each direction. Slow ones are virtual Ethernet pairs between network
    namespaces, made for the measurement and gone with its processes; where that is not permitted, all-reduces
    wait for tokens. Gradients travel as in training (`clicktrain.comm.masked_allreduce_hook`).

    Raises:
        UserError: a setting that cannot be, ``tc`` where it is not permitted, or a process that has failed.
    """
    check_rounds(rounds)
    check_sparsity(case.compressions, (1,))
    asked = sorted({Link.parse(text) for text in links}, key=lambda link: -(link.gbit_s or 1e9))
    if not asked or not processes or min(processes) < 2:
        raise UserError("at least one link and two processes are needed")
    if case.batch_size < 1 or case.image_size < 1:
        raise UserError("batch_size and image_size are at least 1")
    if any(k < 1 for k in case.reconfigurations):
        raise UserError(f"reconfigurations are at least 1 each, not {case.reconfigurations}")
    StepCase(case.model, case.batch_size, case.image_size).network()  # what is wrong with it is said here
    if slowed not in SLOWED:
        raise UserError(f"slowed is one of {', '.join(SLOWED)}, not {slowed!r}")
    unshare = None if slowed == "token-bucket" else unshare_command()
    if slowed == "tc" and unshare is None:
        raise UserError("this machine permits no network namespaces with tc: take token-bucket")
    rows: list[ExchangeRow] = []
    for number in processes:
        wired = [link for link in asked if link.gbit_s is not None and unshare is not None]
        for group in ([link for link in asked if link not in wired], wired):
            if group:
                with_wires = unshare if group is wired else None
                rows += _measured(case, number, group, rounds, with_wires, progress)
    order = names(case.compressions, case.reconfigurations)
    place = {link.name: number for number, link in enumerate(asked)}
    return sorted(
        rows, key=lambda row: (row.processes, place[row.link], order.index(row.what.removesuffix(GROWS)))
    )


def _measured(
    case: ExchangeCase,
    processes: int,
    links: Sequence[Link],
    rounds: int,
    unshare: list[str] | None,
    progress: Progress,
) -> list[ExchangeRow]:
    """Rows of one number of processes; the networks are made once for all links."""
    threads = case.threads or max((os.cpu_count() or 1) // processes, 1)
    settings = asdict(case)
    with tempfile.TemporaryDirectory(prefix="clicktrain-exchange-") as folder, termination_as_exit():
        job = {
            "parent": os.getpid(),
            "store": str(Path(folder) / "store"),
            "wired": unshare is not None,
            "processes": processes,
            "links": ["loopback" if link.gbit_s is None else str(link.gbit_s) for link in links],
            "whats": names(case.compressions, case.reconfigurations),
            "rounds": rounds,
            **{key: settings[key] for key in ("model", "batch_size", "image_size")},
            "threads": threads,
        }
        rows = []
        with _started(job, unshare or [], Path(folder)) as lines:
            for line in lines:
                said = json.loads(line)
                if "progress" in said:
                    progress(f"{said['progress']} in {processes} processes")
                else:
                    rows.append(ExchangeRow(**{**said, "step_ms_range": tuple(said["step_ms_range"])}))
    return rows


@contextlib.contextmanager
def _started(job: dict[str, Any], unshare: list[str], folder: Path) -> Iterator[Iterator[str]]:
    """Start the hub; what it prints, line by line. It is killed with all processes when the block is left."""
    package = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [*unshare, sys.executable, "-m", "clicktrain.bench.exchange.hub", json.dumps(job)]
    errors = folder / "hub.err"
    with errors.open("w") as stream:
        hub = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(job["threads"])},
            start_new_session=True,  # Ctrl-C comes to this process, which then ends the others
        )
    try:
        assert hub.stdout is not None
        yield iter(hub.stdout)
        if hub.wait() != 0:
            raise UserError(f"the measurement failed: {errors.read_text(errors='replace').strip()[-2000:]}")
    finally:
        hub.terminate()  # it ends its processes itself; where it cannot, the system does
        try:
            hub.wait(timeout=5)
        except subprocess.TimeoutExpired:
            hub.kill()
            hub.wait()
        if hub.stdout is not None:
            hub.stdout.close()


BYTES_OVER = 0.05
"""Share of the dense network's bytes that may travel beyond those of kept weights after the hard prune."""
FASTER = 4.0
"""Times as fast as the dense one that a step at 10x should be over `SLOW`."""
SLOW = Link(0.1).name


def check_targets(case: ExchangeCase, rows: Sequence[ExchangeRow]) -> list[dict[str, Any]]:
    """What was to be reached and what was: bytes after the hard prune, and steps over a slow link."""
    found = {(row.what, row.processes, row.link): row for row in rows}
    results = []
    for processes, link in dict.fromkeys((row.processes, row.link) for row in rows):
        dense = found["dense", processes, link]
        for compression in case.compressions:
            pruned = found[f"clicktrain {compression:g}x", processes, link]
            if link == rows[0].link:  # the same over all of them
                share, most = pruned.bytes_per_step / dense.bytes_per_step, 1 / compression + BYTES_OVER
                name = f"bytes of {pruned.what} over those of dense, {processes} processes"
                results.append({"what": name, "wanted": most, "reached": share, "met": share <= most})
            if link == SLOW and compression == 10:
                times = dense.step_ms / pruned.step_ms
                name = f"step of dense over that of {pruned.what}, {processes} processes, {link}"
                results.append({"what": name, "wanted": FASTER, "reached": times, "met": times >= FASTER})
    return results


def sentences(case: ExchangeCase, rows: Sequence[ExchangeRow]) -> list[str]:
    """Where the overlap of exchange and computing eats the gain, one sentence for each link."""
    found = {(row.what, row.processes, row.link): row for row in rows}
    what = f"clicktrain {case.compressions[-1]:g}x"
    said = []
    for processes, link in dict.fromkeys((row.processes, row.link) for row in rows):
        dense, pruned = found["dense", processes, link], found[what, processes, link]
        exchange = dense.exchange_ms - pruned.exchange_ms
        waiting = dense.step_ms - dense.compute_ms - (pruned.step_ms - pruned.compute_ms)
        said.append(
            f"{processes} processes, {link}: of the dense exchange's {dense.exchange_ms:.0f} ms, "
            f"{100 * dense.hidden:.0f}% are hidden behind computing; {what} exchanges for {exchange:.0f} ms "
            f"less, and its steps wait {waiting:.0f} ms less"
        )
    return said


def to_json(rows: Sequence[ExchangeRow]) -> list[dict[str, Any]]:
    """Plain values, with the share of the exchange that is hidden behind computing."""
    return [{**asdict(row), "hidden": row.hidden} for row in rows]
