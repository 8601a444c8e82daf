"""Workers killed by SIGKILL at random moments, and runs that go on with as many or with other workers.

    python tests/robustness/worker_kills.py --moments 30 --seed 1 --out /tmp/worker-kills

A run of several processes, started by PyTorch's launcher, loses one of them, or all with their launcher:

* rendezvous: before the first step, while the processes find each other and prepare;
* time: any time in the run;
* checkpoint: the first process, exactly when it touches a file of the run's folder, checkpoints included;
* launcher: everything at once, at any time.

Half of the runs whose launcher has survived are restarted by it, the others are resumed, mostly with another
number of processes. Each ends as the run that nothing disturbed: with as many processes, one or two, bit for
bit, files and logs included; else with the same decisions and kept weights, and weights equal up to rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from kills import Moment, Watch, differences
from safetensors.torch import load_file
from workers import lead

from clicktrain.train import RunFolder

COMMON: dict[str, Any] = {
    "model": "tiny_networks:tiny",  # with dropout
    "data": "synthetic:classes=4,size=8,channels=1,train=96,val=40",
    "batch_size": 24, "epochs": 4, "threads": 1, "learning_rate": 0.05, "operators": "reference",
}  # fmt: skip
_STAGES = {"pool_length": 0.15, "finalize_length": 0.15, "regularize_length": 0.15}


@dataclass(frozen=True)
class Run:
    """Settings, processes that begin, and how many may go on."""

    settings: dict[str, Any]
    processes: int
    others: tuple[int, ...]


RUNS: dict[str, Run] = {
    "clicktrain": Run(
        {"method": "clicktrain", "compression": 2, **_STAGES, "model": "workers:troubled"}, 2, (2, 1, 3)
    ),
    "prunetrain": Run(
        {"method": "prunetrain", "coefficient": 0.1, "interval": 1, "model": "resnet20", "width": 0.25,
         "epochs": 3}, 2, (2, 1),
    ),
    "rigl": Run({"method": "rigl", "sparsity": 0.8, "interval": 3, "batch_size": 22}, 4, (4, 3)),
    "dsr": Run(
        {"method": "dsr", "sparsity": 0.5, "interval": 3, "packed": False, "model": "workers:troubled"},
        1, (2, 1),
    ),
}  # fmt: skip
KINDS = ("rendezvous", "time", "checkpoint", "launcher")
ROUNDING = 2e-3
"""Largest difference of weights of another number of processes, of their largest; norms amplify rounding."""


@dataclass
class Counts:
    """What the campaign saw."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


# ---- one launch ----------------------------------------------------------------------------------


@dataclass
class Launch:
    """A launcher that runs: its process, and a folder in which its workers leave their numbers."""

    process: int
    pids: Path
    since: float

    def worker(self, rank: int) -> int | None:
        """The process of a rank in its first life, once it is there."""
        path = self.pids / f"0-{rank}"
        return int(path.read_text()) if path.exists() and path.read_text() else None

    def end(self) -> int | None:
        """The exit code, if it has ended."""
        ended, status = os.waitpid(self.process, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if ended else None

    def kill(self) -> None:
        """Kill launcher and workers."""
        os.killpg(self.process, signal.SIGKILL)


def start(
    words: list[str], processes: int, restarts: int, place: Path, log: Path, at_file: int = 0
) -> Launch:
    """Fork a launcher; ``at_file``: its first process kills itself at that change of a file."""
    pids = place / "pids"
    shutil.rmtree(pids, ignore_errors=True)
    pids.mkdir(parents=True)
    process = os.fork()
    if not process:
        os.setpgid(0, 0)
        os.environ |= {"WORKER_PIDS": str(pids), "WORKER_DIES_AT_FILE": str(at_file)}
        os._exit(lead(words, processes, restarts, log, prepare=worker_begins))
    return Launch(process, pids, time.monotonic())


def worker_begins() -> None:
    """In a worker, before its command."""
    life, rank = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ["RANK"]
    (Path(os.environ["WORKER_PIDS"]) / f"{life}-{rank}").write_text(str(os.getpid()))
    number = int(os.environ["WORKER_DIES_AT_FILE"])
    if number and (life, rank) == ("0", "0"):
        folder = Path(os.environ["WORKER_PIDS"]).parent / "run"
        moment = Moment("file", signal.SIGKILL, event=number)
        sys.addaudithook(Watch(folder, moment, os.open(os.devnull, os.O_WRONLY)))


# ---- one run -------------------------------------------------------------------------------------


def words_of(place: Path, folder: Path, resume: bool) -> list[str]:
    model = yaml.safe_load((place / "settings.yaml").read_text())["model"]
    own = ["--model", model] if ":" in model else []
    if resume:
        return ["resume", str(folder), *own, "--no-report", "--quiet"]
    settings = str(place / "settings.yaml")
    return ["train", "--config", settings, *own, "--out", str(folder), "--no-report", "--quiet"]


def undisturbed(name: str, place: Path) -> tuple[Path, float]:
    """The run that nothing disturbs, and its seconds."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "settings.yaml").write_text(yaml.safe_dump({**COMMON, **RUNS[name].settings}))
    folder, log = place / "undisturbed", place / "undisturbed.log"
    shutil.rmtree(folder, ignore_errors=True)
    launch = start(words_of(place, folder, False), RUNS[name].processes, 0, place, log)
    assert wait(launch) == 0, log.read_text()
    return folder, time.monotonic() - launch.since


def wait(launch: Launch) -> int:
    until = time.monotonic() + 400
    while (code := launch.end()) is None:
        if time.monotonic() > until:
            launch.kill()
            raise TimeoutError("a launch did not end")
        time.sleep(0.02)
    return code


def disturb(
    name: str, kind: str, place: Path, whole: tuple[Path, float], rng: random.Random, seen: Counts
) -> None:
    """Kill once, go on, compare."""
    run, folder, log = RUNS[name], place / "run", place / "run.log"
    shutil.rmtree(folder, ignore_errors=True)
    log.unlink(missing_ok=True)
    at_file = rng.randint(1, 40) if kind == "checkpoint" else 0
    restarts = 1 if kind != "launcher" and run.processes > 1 and rng.random() < 0.5 else 0
    victim = rng.randrange(run.processes)
    launch = start(words_of(place, folder, False), run.processes, restarts, place, log, at_file)
    killed = strike(launch, kind, victim, whole[1], rng)
    code, number = wait(launch), run.processes
    if restarts and code != 0:
        seen.wrong.append(f"{name} {kind}: exit code {code} with a restart: {log.read_text()[-600:]}")
        return
    if code != 0:
        killed = True
        number = rng.choice(run.others)
        begun = (folder / "config.yaml").exists()
        code = wait(start(words_of(place, folder, begun), number, 0, place, log))
        number = number if begun else -number
    if not killed:
        return  # it had ended before its moment
    if number < 0:  # nothing had been written: another run, of as many parts as it has processes
        number, same = -number, -number == run.processes
        if not same:
            seen.ways["begun again"] += 1
            seen.kills[name, kind] += 1
            if code != 0:
                seen.wrong.append(f"{name} {kind}: exit code {code}: {log.read_text()[-600:]}")
            return
    seen.kills[name, kind] += 1
    way = "restarted" if restarts else f"{run.processes} to {number}"
    seen.ways[way] += 1
    if code != 0:
        seen.wrong.append(f"{name} {kind} {way}: exit code {code}: {log.read_text()[-600:]}")
        return
    # Of three processes or more, DistributedDataParallel adds up in another order in its first step.
    exact = number == run.processes <= 2
    found = differences(folder, whole[0]) if exact else decided_otherwise(folder, whole[0])
    if found:
        kept = place / f"wrong-{len(seen.wrong)}"
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        seen.wrong.append(f"{name} {kind} {way}: {', '.join(found)} differ: {kept}")


def strike(launch: Launch, kind: str, victim: int, seconds: float, rng: random.Random) -> bool:
    """Send the signal at its moment; whether somebody was there to get it."""
    if kind == "checkpoint":
        return True
    while launch.worker(victim) is None and time.monotonic() < launch.since + 60:
        time.sleep(0.005)
    until = time.monotonic() + rng.uniform(0, 0.25 * seconds if kind == "rendezvous" else seconds)
    while time.monotonic() < until:
        time.sleep(0.002)
    process = launch.worker(victim)
    try:
        if kind == "launcher":
            launch.kill()
        elif process is not None:
            os.kill(process, signal.SIGKILL)
        return process is not None
    except ProcessLookupError:
        return False


def decided_otherwise(one: Path, two: Path) -> list[str]:
    """What differs but for rounding between runs of different numbers of processes."""
    found = []
    first, second = (load_file(path / "model.safetensors") for path in (one, two))
    if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in second.items()}:
        return ["shapes"]
    for name, value in second.items():
        scale = max(float(value.double().abs().max()), 1.0 if value.dim() < 2 else 1e-3)
        if value.dim() > 1 and not bool(((first[name] != 0) == (value != 0)).all()):
            found.append(f"kept weights of {name}")
        elif float((first[name].double() - value.double()).abs().max()) > ROUNDING * scale:
            found.append(name)
    decisions = [
        [
            {k: v for k, v in line.items() if not isinstance(v, float | list | dict)}
            for line in RunFolder(path).read_events()
        ]
        for path in (one, two)
    ]
    epochs = [[line["epoch"] for line in RunFolder(path).read_metrics()] for path in (one, two)]
    found += [] if decisions[0] == decisions[1] else ["events"]
    return found + ([] if epochs[0] == epochs[1] else ["epochs"])


# ---- the campaign --------------------------------------------------------------------------------


def campaign(moments: int, seed: int, out: Path, names: list[str]) -> Counts:
    """Disturb runs in turn until that number of kills has hit."""
    rng, seen = random.Random(seed), Counts()
    whole = {name: undisturbed(name, out / name) for name in names}
    turn = 0
    while seen.kills.total() < moments and len(seen.wrong) < 5:
        name = names[turn % len(names)]
        kind = KINDS[(turn // len(names) + turn) % len(KINDS)]
        disturb(name, kind, out / name, whole[name], rng, seen)
        turn += 1
        print(f"{seen.kills.total()} kills, {len(seen.wrong)} wrong", flush=True)
    return seen


def table(seen: Counts) -> Iterator[str]:
    """The counts, as Markdown."""
    yield "| run | " + " | ".join(KINDS) + " | kills |"
    yield "|---" * (len(KINDS) + 2) + "|"
    for name in RUNS:
        cells = [seen.kills[name, kind] for kind in KINDS]
        yield f"| {name} | " + " | ".join(map(str, cells)) + f" | {sum(cells)} |"
    yield ""
    yield ", ".join(f"{way}: {count}" for way, count in sorted(seen.ways.items()))


def main() -> int:
    """Run the campaign; 0 if nothing differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--moments", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1] / "train"))  # networks small enough
    seen = campaign(given.moments, given.seed, given.out.absolute(), given.runs)
    print("\n".join(table(seen)))
    for line in seen.wrong:
        print(f"WRONG {line}")
    result = {"kills": seen.kills.total(), "ways": seen.ways, "wrong": seen.wrong}
    (given.out / "result.json").write_text(json.dumps(result))
    return 1 if seen.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
