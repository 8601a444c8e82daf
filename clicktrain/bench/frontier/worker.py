"""One run of a frontier in a process of its own: ``python -m clicktrain.bench.frontier.worker``.

It reads a job, a line of JSON, from standard input, trains or resumes, and prints the run's line as its last
line. When standard input is closed, as it is when the process that gave the job is killed, it stops as if it
had got SIGTERM: with a checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clicktrain.bench.frontier.lines import failed_line, finished_line
from clicktrain.bench.frontier.recipe import Cell
from clicktrain.errors import NetworkCollapsed, UserError
from clicktrain.runs.folder import RunFolder
from clicktrain.runs.new_folder import exists, only_begun
from clicktrain.train import TrainingDiverged, TrainingInterrupted, config_to_dict, load_run_config
from clicktrain.train.fit import fit
from clicktrain.train.progress import Silent

REFUSED = 2
"""The exit code of a run that could not be done."""


def job_text(cell: Cell, seed: int, folder: Path, initial_weights: Path | None) -> str:
    """A job for a worker."""
    initial = None if initial_weights is None else str(initial_weights)
    return json.dumps({"cell": asdict(cell), "seed": seed, "folder": str(folder), "initial": initial})


class _Log(Silent):
    """Prints a line per epoch, for the log file."""

    def epoch(self, record: dict[str, Any]) -> None:
        """Print what is known of the epoch."""
        accuracy = record["val_accuracy"]
        print(f"epoch {record['epoch']}: loss {record['train_loss']:.4f}, accuracy {accuracy}", flush=True)

    def message(self, text: str) -> None:
        """Print a message."""
        print(text, flush=True)


def run_job(text: str) -> dict[str, Any]:
    """Carry out a job; the line of the run.

    Raises:
        UserError: it could not be done, for a reason that is not the method's.
        TrainingInterrupted: a signal came; the run can be resumed.
    """
    job = json.loads(text)
    given = job["cell"]
    cell = Cell(**{**given, "seeds": tuple(given["seeds"])})
    seed, folder = job["seed"], RunFolder(Path(job["folder"]))
    config, method = cell.config(seed, job["initial"])
    resume = exists(folder.path) and not only_begun(folder.path)
    if resume:
        wanted, found = config_to_dict(config, method), load_run_config(folder)
        # Settings that a version before had not are at their defaults.
        if other := _difference(*(json.loads(json.dumps(s)) for s in (config_to_dict(*found), wanted))):
            raise UserError(
                f"{folder.path} holds a run with another {other}: remove it, or give the cell another name"
            )
        config, method = found
    try:
        fit(config, method, folder, progress=_Log(), resume=resume)
    except (NetworkCollapsed, TrainingDiverged) as failure:
        return failed_line(cell, seed, str(failure).partition(";")[0])
    return finished_line(cell, seed, folder)


def _difference(there: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first setting in which a run that is there differs from the one that is wanted."""
    free = {"threads", "workers", "cache_dir"}
    if wanted["time_budget"] is not None:
        free |= {"epochs", "budget_epochs"}  # chosen when the run began
    return next((n for n, value in wanted.items() if n not in free and there.get(n) != value), None)


def _stop_when_alone() -> None:
    sys.stdin.read()  # returns once nobody can write there any more
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Do the job on standard input; the exit code."""
    job = sys.stdin.readline()
    threading.Thread(target=_stop_when_alone, daemon=True).start()
    try:
        line = run_job(job)
    except TrainingInterrupted as stop:
        print(stop, file=sys.stderr, flush=True)
        return stop.exit_code
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return REFUSED
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
