"""Runs of every method, killed at random moments and resumed until they finish: nothing may differ.

    python tests/robustness/kills.py --moments 150 --seed 1 --out /tmp/kills

Every run is a real process that gets a real signal. Importing PyTorch takes longer than these runs: this
process imports it once, computes nothing, and forks each run. A moment is

* time: any time in the run, from its start on;
* file: exactly when the run touches a file of its folder (makes, opens for writing, renames, removes);
* near: up to 20 ms later, in the middle of writing for instance;
* decision: up to 50 ms after a decision is written down: masks are frozen, channels removed.

What continues a killed run is killed as well, mostly.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import select
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from clicktrain.cli import main as clicktrain_main
from clicktrain.formats.atomic import is_leftover
from clicktrain.train import RunFolder

for module in ("commands.train", "commands.resume", "commands.progress", "train", "compiler"):
    importlib.import_module(f"clicktrain.{module}")  # now, not in every fork
importlib.import_module("torch._dynamo")  # by the first optimizer, and as slow as the rest of PyTorch

COMMON: dict[str, Any] = {
    "model": "tiny_networks:tiny", "data": "synthetic:classes=4,size=8,channels=1,train=128,val=40",
    "batch_size": 32, "epochs": 6, "threads": 1, "learning_rate": 0.05, "precision": "fp32",
}  # fmt: skip
_STAGES = {"pool_length": 0.15, "finalize_length": 0.15, "regularize_length": 0.15}
RUNS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense", "optimizer": "adamw", "learning_rate": 3e-3},
    "clicktrain": {"method": "clicktrain", "compression": 4, **_STAGES},
    "prunetrain": {
        "method": "prunetrain", "coefficient": 0.1, "interval": 1, "model": "resnet20", "width": 0.25,
    },
    "campfire": {"method": "campfire", "sparsity": 0.6, "packed": False, "ema_decay": 0.9},
    "pat": {"method": "pat", "prune_ratio": 0.3, "prune_steps": 3},
    "dsr": {"method": "dsr", "sparsity": 0.8, "interval": 3, "operators": "reference"},
    "rigl": {"method": "rigl", "sparsity": 0.8, "interval": 3, "packed": False},
    "prunetrain-clicktrain": {
        "method": "prunetrain-clicktrain", "coefficient": 0.02, "interval": 1, "operators": "reference",
        "pattern_compression": 3,
    },
}  # fmt: skip
KINDS = ("time", "file", "near", "decision")
TIMES = frozenset(
    (
        "seconds",
        "planning_seconds",
        "data_seconds",
        "step_ms_median",
        "train_seconds",
        "total_train_seconds",
        "data_share",
        "step_ms",
    )
)
FINISHED = 0
AGAIN = 0.75
"""Probability that what continues a killed run is killed as well."""


@dataclass(frozen=True)
class Moment:
    """When a process gets its signal: after ``seconds``, or ``delay`` after file event ``event``."""

    kind: str
    signum: int
    seconds: float = 0.0
    event: int = 0
    delay: float = 0.0


@dataclass
class Undisturbed:
    """A run that nothing disturbed: its folder, how long it took and which files it touched, in order."""

    path: Path
    seconds: float
    touched: list[str]


@dataclass
class Counts:
    """What the campaign saw."""

    signals: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """(run, kind of moment, signal) -> processes that got it while they ran."""
    runs: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


# ---- one process ---------------------------------------------------------------------------------


def start(arguments: list[str], folder: Path, moment: Moment | None, log: Path) -> tuple[int, int]:
    """Fork a process that runs the command line; (process, pipe that tells of file events)."""
    read, write = os.pipe()
    process = os.fork()
    if process:
        os.close(write)
        return process, read
    code = 1
    try:
        os.close(read)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        sys.addaudithook(Watch(folder, moment, write))
        code = clicktrain_main(arguments)
        sys.stdout.flush()
    except BaseException:  # what Python itself would do
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


class Watch:
    """Tells the parent of every change to files in a folder, and kills this process at one of them."""

    def __init__(self, folder: Path, moment: Moment | None, pipe: int) -> None:
        self.folder, self.moment, self.pipe = str(folder), moment, pipe
        self.count = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            path = arguments[0] if arguments else None
            changes = event in ("os.rename", "os.mkdir", "os.remove", "os.truncate", "os.rmdir")
        if not changes or not isinstance(path, (str, os.PathLike)):
            return
        path = os.fspath(path)
        if not isinstance(path, str) or not os.path.abspath(path).startswith(self.folder):
            return
        self.count += 1
        os.write(self.pipe, f"{event} {os.path.basename(path)}\n".encode())
        if self.moment is not None and self.moment.kind == "file" and self.count == self.moment.event:
            os.kill(os.getpid(), self.moment.signum)


def watch_over(process: int, pipe: int, moment: Moment | None) -> tuple[int, bool, list[str]]:
    """Wait for a process, signalling it at its moment; (exit code, whether it got the signal, its events)."""
    started, text, due = time.monotonic(), b"", None
    if moment is not None and moment.kind == "time":
        due = started + moment.seconds
    sent = status = None
    while status is None:
        timeout = 5.0 if due is None else max(due - time.monotonic(), 0.0)
        if select.select([pipe], [], [], min(timeout, 5.0))[0]:
            piece = os.read(pipe, 65536)
            text += piece
            if not piece:
                status = os.waitpid(process, 0)[1]
                break
            counted = text.count(b"\n")
            if moment is not None and moment.kind in ("near", "decision") and due is None and not sent:
                due = time.monotonic() + moment.delay if counted >= moment.event else None
        if due is not None and time.monotonic() >= due:
            assert moment is not None
            os.kill(process, moment.signum)  # it is ours until it is waited for
            sent, due = True, None
        if time.monotonic() - started > 300:
            os.kill(process, signal.SIGKILL)
            raise TimeoutError(f"process {process} did not end")
    os.close(pipe)
    events = text.decode().splitlines()
    code = os.waitstatus_to_exitcode(status)
    if moment is not None and moment.kind == "file":
        sent = len(events) >= moment.event
    return code, bool(sent) and code != FINISHED, events


# ---- one run -------------------------------------------------------------------------------------


def run_undisturbed(name: str, place: Path) -> Undisturbed:
    """Twice: the first one may compile kernels."""
    write_settings(name, place)
    for _ in range(2):
        folder = place / "undisturbed"
        shutil.rmtree(folder, ignore_errors=True)
        before = time.monotonic()
        process, pipe = start(command(place, folder), folder, None, place / "undisturbed.log")
        code, _, events = watch_over(process, pipe, None)
        seconds = time.monotonic() - before
        assert code == FINISHED, (place / "undisturbed.log").read_text()
    return Undisturbed(folder, seconds, events)


def write_settings(name: str, place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "settings.yaml").write_text(yaml.safe_dump({**COMMON, **RUNS[name]}))


def command(place: Path, folder: Path) -> list[str]:
    settings = place / "settings.yaml"
    return ["train", "--config", str(settings), *own_network(place), "--out", str(folder), "--no-report"]


def own_network(place: Path) -> list[str]:
    """What a user gives who trains a network of his own."""
    model = yaml.safe_load((place / "settings.yaml").read_text())["model"]
    return ["--model", model] if ":" in model else []


def draw(rng: random.Random, whole: Undisturbed) -> Moment:
    kind = rng.choice(KINDS)
    signum = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
    if kind == "time":
        return Moment(kind, signum, seconds=rng.uniform(0, whole.seconds))
    events = range(1, len(whole.touched) + 1)
    if kind == "decision":
        events = [n for n in events if "events.jsonl" in whole.touched[n - 1]] or events
        return Moment(kind, signum, event=rng.choice(events), delay=rng.uniform(0, 0.05))
    return Moment(kind, signum, event=rng.choice(events), delay=rng.uniform(0, 0.02))


def disturb(
    name: str, number: int, place: Path, whole: Undisturbed, rng: random.Random, seen: Counts
) -> None:
    """Kill a run again and again, continue it until it finishes, compare."""
    folder, log = place / f"run-{number}", place / f"run-{number}.log"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier campaign
    log.unlink(missing_ok=True)
    for attempt in range(40):
        moment = draw(rng, whole) if attempt == 0 or rng.random() < AGAIN else None
        arguments = how_to_go_on(folder, place, rng)
        process, pipe = start(arguments, folder, moment, log)
        code, got_it, _ = watch_over(process, pipe, moment)
        if got_it:
            assert moment is not None
            seen.signals[name, moment.kind, signal.Signals(moment.signum).name] += 1
            if code not in (-moment.signum, 128 + moment.signum):
                seen.wrong.append(f"{name} {number}: exit code {code} after {moment}: {log}")
                return
        elif code != FINISHED:
            seen.wrong.append(f"{name} {number}: exit code {code} of {' '.join(arguments)}: {log}")
            return
        if code == FINISHED:
            break
    seen.runs[name] += 1
    different = differences(folder, whole.path)
    if different:
        seen.wrong.append(f"{name} {number}: {', '.join(different)} differ: {folder}")
    else:
        shutil.rmtree(folder)


def how_to_go_on(folder: Path, place: Path, rng: random.Random) -> list[str]:
    """Resume; the same command again if there is no checkpoint."""
    run = RunFolder(folder)
    resumable = run.config.exists()
    if not run.checkpoints() and (not resumable or rng.random() < 0.5):
        return command(place, folder)
    return ["resume", str(folder), *own_network(place), "--no-report"]


def differences(one: Path, two: Path) -> list[str]:
    """Names of what is not the same to the last bit; times aside."""
    a, b = RunFolder(one), RunFolder(two)
    found = []
    for file in ("model.safetensors", "packed.safetensors"):
        first, second = load_file(one / file), load_file(two / file)
        same = first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
        found += [] if same else [file]
    for what in ("read_metrics", "read_events", "read_channels"):
        lines = [[without_times(line) for line in getattr(run, what)()] for run in (a, b)]
        found += [] if lines[0] == lines[1] else [what]
    if without_times(a.summary() or {}) != without_times(b.summary() or {}):
        found.append("summary.json")
    names = [sorted(p.name for p in path.iterdir()) for path in (one, two)]
    if names[0] != names[1] or any(is_leftover(p) for p in one.rglob("*")):
        found.append(f"files ({sorted(set(names[0]) ^ set(names[1]))})")
    return found


def without_times(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES}


# ---- the campaign --------------------------------------------------------------------------------


def campaign(moments: int, seed: int, out: Path, names: list[str]) -> Counts:
    """Disturb runs in turn until that number of signals has hit."""
    rng, seen = random.Random(seed), Counts()
    whole = {name: run_undisturbed(name, out / name) for name in names}
    number = 0
    while seen.signals.total() < moments and len(seen.wrong) < 5:
        for name in names:
            disturb(name, number, out / name, whole[name], rng, seen)
        number += 1
        print(
            f"{seen.signals.total()} signals, {seen.runs.total()} runs, {len(seen.wrong)} wrong", flush=True
        )
    return seen


def table(seen: Counts) -> Iterator[str]:
    """The counts, as Markdown."""
    signals = ("SIGKILL", "SIGTERM")
    heads = [f"{kind} {signum}" for kind in KINDS for signum in signals]
    yield "| run | " + " | ".join(heads) + " | signals | runs compared |"
    yield "|---" * (len(heads) + 3) + "|"
    for name in RUNS:
        cells = [seen.signals[name, kind, signum] for kind in KINDS for signum in signals]
        yield f"| {name} | " + " | ".join(map(str, cells)) + f" | {sum(cells)} | {seen.runs[name]} |"
    total = [sum(seen.signals[n, kind, signum] for n in RUNS) for kind in KINDS for signum in signals]
    yield "| all | " + " | ".join(map(str, total)) + f" | {sum(total)} | {seen.runs.total()} |"


def main() -> int:
    """Run the campaign; 0 if nothing differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--moments", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1] / "train"))  # networks small enough
    out = given.out.absolute()
    os.environ["XDG_CACHE_HOME"] = str(out / "cache")  # kernels are compiled once for the campaign
    seen = campaign(given.moments, given.seed, out, given.runs)
    print("\n".join(table(seen)))
    for line in seen.wrong:
        print(f"WRONG {line}")
    result = {"signals": seen.signals.total(), "runs": seen.runs.total(), "wrong": seen.wrong}
    (out / "result.json").write_text(json.dumps(result))
    return 1 if seen.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
