"""Trains the runs of a grid that are not done yet, several at a time, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from clicktrain.bench.frontier.lines import Line, add_line, is_of
from clicktrain.bench.frontier.recipe import Cell, run_name
from clicktrain.bench.frontier.worker import job_text
from clicktrain.bench.timing import Progress

_POLL_SECONDS = 0.1
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


@dataclass(frozen=True)
class Job:
    """A run that is to be done; ``after``: the one that it starts from."""

    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        """Name of the run."""
        return run_name(self.cell, self.seed)

    @property
    def after(self) -> tuple[str, int] | None:
        """Cell and seed of the run whose network this one starts from."""
        return None if self.cell.after is None else (self.cell.after, self.seed)


class GridInterrupted(Exception):  # noqa: N818 - not an error: the grid was asked to stop
    """A signal came; the runs that were going on have written checkpoints."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


def jobs_of(cells: Sequence[Cell], lines: dict[tuple[str, int], Line]) -> list[Job]:
    """The runs without a line of their present settings: the first seed of all cells first.

    One that starts from another comes after it.
    """
    rounds = max((len(cell.seeds) for cell in cells), default=0)
    jobs = [Job(cell, cell.seeds[i]) for i in range(rounds) for cell in cells if i < len(cell.seeds)]
    left = [job for job in jobs if not _done(job, lines)]
    return sorted(left, key=lambda job: job.after is not None)


def _done(job: Job, lines: dict[tuple[str, int], Line]) -> bool:
    line = lines.get((job.cell.name, job.seed))
    return line is not None and is_of(line, job.cell)


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[str]
    log: IO[str]
    output: Path
    began: float


def run_grid(
    jobs: Sequence[Job],
    *,
    out: Path,
    results: Path,
    lines: dict[tuple[str, int], Line],
    processes: int = 1,
    progress: Progress = lambda text: None,
) -> list[str]:
    """Do runs, or resume them, below the folder ``out``; their lines go to the file ``results``.

    Args:
        jobs: from `jobs_of`.
        out, results: made if need be.
        lines: those that are there; the new ones are added.
        processes: runs at a time.
        progress: called with what begins and ends.

    Returns:
        A sentence for each run that could not be done.

    Raises:
        GridInterrupted: a signal came, and was passed on; the runs have written checkpoints.
    """
    waiting, running, problems = list(jobs), list[_Running](), list[str]()
    out.mkdir(parents=True, exist_ok=True)
    with _noted_signal() as came:
        while waiting or running:
            while waiting and len(running) < processes and not came:
                job = _next(waiting, running, lines, problems)
                if job is None:
                    break
                progress(f"{job.name}: begins, {len(waiting)} more to do")
                running.append(_start(job, out))
            time.sleep(_POLL_SECONDS)
            if came and running and running[0].process.poll() is None:
                for one in running:
                    if one.process.poll() is None:
                        one.process.send_signal(signal.SIGTERM)
                for one in running:
                    one.process.wait()
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                _end(one, results, lines, problems, progress, stopped=bool(came))
            if came and not running:
                raise GridInterrupted(came[0])
    return problems


def _next(
    waiting: list[Job], running: list[_Running], lines: dict[tuple[str, int], Line], problems: list[str]
) -> Job | None:
    """The first run that can begin; those that never can are taken off the list."""
    going = {(one.job.cell.name, one.job.seed) for one in running}
    for job in list(waiting):
        first = job.after
        if first is not None and (first in going or any((j.cell.name, j.seed) == first for j in waiting)):
            continue
        waiting.remove(job)
        if first is not None and lines.get(first, {}).get("status") != "finished":
            problems.append(f"{job.name}: the run {first[0]}/seed-{first[1]} that it starts from is not done")
            continue
        return job
    return None


def _start(job: Job, out: Path) -> _Running:
    folder = out / job.cell.name / f"seed-{job.seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    output = folder.parent / f"seed-{job.seed}.log"
    log = output.open("w", encoding="utf-8")
    package = str(Path(__file__).resolve().parents[3])
    threads = str(job.cell.settings["threads"])
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "clicktrain.bench.frontier.worker"],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches this process only, which passes it on once
    )
    first = None if job.after is None else out / job.after[0] / f"seed-{job.after[1]}"
    assert process.stdin is not None
    process.stdin.write(job_text(job.cell, job.seed, folder, first) + "\n")
    process.stdin.flush()  # and stays open: see the worker
    return _Running(job, process, log, output, time.monotonic())


def _end(
    one: _Running,
    results: Path,
    lines: dict[tuple[str, int], Line],
    problems: list[str],
    progress: Progress,
    *,
    stopped: bool,
) -> None:
    one.log.close()
    if one.process.stdin is not None:
        one.process.stdin.close()
    said = [text for text in one.output.read_text(encoding="utf-8").splitlines() if text.strip()]
    last, code = said[-1] if said else "", one.process.returncode
    if code == 0:
        line = json.loads(last)
        add_line(results, line)
        lines[one.job.cell.name, one.job.seed] = line
        progress(f"{one.job.name}: {_in_words(line)}, {time.monotonic() - one.began:.0f} s")
    elif not stopped:
        reason = last if code > 0 else f"its process was killed by signal {-code}; start again to resume it"
        problems.append(f"{one.job.name}: {reason}")
        progress(problems[-1])


def _in_words(line: Line) -> str:
    if line["status"] == "failed":
        return f"failed: {line['reason']}"
    figures: dict[str, Any] = line["figures"]
    return f"finished with {figures['val_accuracy']:.2f}% on validation images"


@contextmanager
def _noted_signal() -> Iterator[list[int]]:
    """A list that the number of a signal is added to when it comes; only in the main thread."""
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        came.append(signum)

    previous = {}
    try:
        for signum in _SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                previous[signum] = signal.signal(signum, note)
    except ValueError:  # not in the main thread, where no signal arrives
        pass
    try:
        yield came
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
