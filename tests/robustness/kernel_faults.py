"""Ways in which a kernel cache or a compiler can fail, and processes in which they do.

Run as a program it carries out cases: each in a fork of its own, so that a crash is a result like any other,
and PyTorch is imported once for all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GCC = "gcc"
_MS_RDONLY, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 1, 8, 1 << 14, 1 << 18
_CLONE_NEWNS = 1 << 17

# ---------------------------------------------------------------- damage to a file


def _cut(path: Path, rest: float) -> None:
    with open(path, "r+b") as file:
        file.truncate(int(path.stat().st_size * rest))


def _overwrite(path: Path, data: Callable[[int], bytes]) -> None:
    path.write_bytes(data(path.stat().st_size))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.Random(0).randrange(len(data))] ^= 0x10
    path.write_bytes(bytes(data))


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _other_machine(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[18] ^= 0xFF  # e_machine of ELF
    path.write_bytes(bytes(data))


def _zero_the_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = bytes(third)
    path.write_bytes(bytes(data))


def _another_kernels(path: Path) -> None:
    """Under this name, the file of another one; where there is only one, nothing that is a library."""
    others = [other for other in sorted(path.parent.glob("*.so")) if other != path]
    path.write_bytes(others[0].read_bytes() if others else b"no library")


def _another_kernels_name(path: Path) -> None:
    """Another library, intact, under the key of this one."""
    others = [other for other in sorted(path.parent.glob("*.so")) if other != path]
    if others:
        key = path.name.partition(".")[0]
        others[0].rename(path.with_name(f"{key}.{others[0].name.partition('.')[2]}"))
        path.unlink()


DAMAGES: Mapping[str, Callable[[Path], None]] = {
    "cut to a half": lambda path: _cut(path, 0.5),
    "cut by a byte": lambda path: _cut(path, 0.9999),
    "cut in the header": lambda path: _cut(path, 0.001),
    "empty": lambda path: _cut(path, 0),
    "longer": lambda path: _overwrite(path, lambda size: bytes(size + 4096)),
    "zeroed": lambda path: _overwrite(path, bytes),
    "zeroed in the middle": _zero_the_middle,
    "random bytes": lambda path: _overwrite(path, random.Random(1).randbytes),
    "one bit": _flip,
    "of another machine": _other_machine,
    "another kernel's contents": _another_kernels,
    "another kernel under its name": _another_kernels_name,
    "a folder": lambda path: _replace(path, lambda p: (p.mkdir(), (p / "file").write_text("x"))),
    "unreadable": lambda path: path.chmod(0),
    "a dangling link": lambda path: _replace(path, lambda p: p.symlink_to("nowhere")),
    "a link to a library": lambda path: _replace(path, lambda p: p.symlink_to(ctypes.util.find_library("m"))),
    "a pipe": lambda path: _replace(path, os.mkfifo),
    "gone": Path.unlink,
}
"""What can happen to a file in a cache."""

# ---------------------------------------------------------------- compilers

SELF_TEST_ONLY = 'case "$*" in *try.c*|*--version*|*-dM*) exec gcc "$@";; esac\n'
_OUT = 'out=; last=; for a in "$@"; do [ "$last" = -o ] && out=$a; last=$a; done\n'
_SOURCE = 'for a in "$@"; do case "$a" in *.c) src=$a;; esac; done\n'

MISBEHAVIOURS: Mapping[str, str] = {
    "fails": 'echo "kernel.c:1: error: no more" >&2; exit 4',
    "is killed": "kill -9 $$",
    "crashes": "kill -11 $$",
    "hangs": "sleep 600",
    "hangs in a child": "sleep 600 & wait",
    "prints without end": "while :; do echo 0123456789012345678901234567890123456789; done",
    "writes nothing": ":",
    "writes an empty file": ': > "$out"',
    "writes garbage": 'echo rubbish > "$out"',
    "writes half a library": 'gcc "$@" && truncate -s "$(( $(stat -c %s "$out") / 2 ))" "$out"',
    "writes a zeroed library": 'gcc "$@" && dd if=/dev/zero of="$out" bs=1k count=8 conv=notrunc 2>/dev/null',
    "writes a library without functions": (
        'echo "int nothing;" > "$TMPDIR/no.c"; exec gcc -shared -fPIC -o "$out" "$TMPDIR/no.c"'
    ),
    "writes to a folder of that name": 'mkdir "$out"',
}
"""Bodies of shell scripts that stand for a compiler, on the kernels or on everything."""


def fake_compiler(path: Path, body: str, *, kernels_only: bool) -> Path:
    """A compiler that is gcc but for what it does at the end."""
    path.write_text(f"#!/bin/sh\n{SELF_TEST_ONLY if kernels_only else ''}{_OUT}{_SOURCE}{body}\n")
    path.chmod(0o755)
    return path


NONSENSE = (
    'wrong="$TMPDIR/wrong.c"; sed "s/3[.]0f/4.0f/" "$src" > "$wrong"; '
    'exec gcc $(echo "$*" | sed "s#$src#$wrong#")'
)
"""Builds the self-test with another number in it."""
SOME_FAIL = 'grep -q "{pattern}" "$src" && {{ echo "error: internal" >&2; exit 1; }}; exec gcc "$@"'
"""Refuses texts that have a pattern."""

# ---------------------------------------------------------------- cases


@dataclass
class Case:
    """Something done in a process of its own, after something has gone wrong.

    Attributes:
        action: a key of `ACTIONS`.
        arguments: of the action.
        environment: changes to it; None removes a variable.
        damage: name of a damage, and which library of the cache it hits ("all", or a number).
        file_size: no file may become larger, which is how a full disk looks to a writer.
        mount: a folder, and how it is remounted: ``noexec``, ``ro``, or a size.
        seconds: after so many it counts as hung.
    """

    action: str
    arguments: list[Any] = field(default_factory=list)
    environment: dict[str, str | None] = field(default_factory=dict)
    damage: tuple[str, str] | None = None
    file_size: int | None = None
    mount: tuple[str, str] | None = None
    seconds: int = 120


@dataclass
class Outcome:
    """How a case ended.

    Attributes:
        signal: that ended the process; 0 if none did.
        result: what the action returned.
        warnings: what was warned of.
        error: an exception that nobody caught, as text.
        skipped: why the case cannot be tried here.
    """

    signal: int = 0
    result: Any = None
    warnings: list[str] = field(default_factory=list)
    error: str = ""
    skipped: str = ""


def run_cases(cases: Mapping[str, Case], folder: Path) -> dict[str, Outcome]:
    """Carry out cases in forks of one fresh process; results by the same names."""
    request, answer = folder / "cases.json", folder / "outcomes.json"
    request.write_text(json.dumps({name: vars(case) for name, case in cases.items()}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _paths()}
    command = [sys.executable, __file__, str(request), str(answer)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: Outcome(**one) for name, one in json.loads(answer.read_text()).items()}


def _paths() -> str:
    here = Path(__file__).resolve()
    return os.pathsep.join([str(here.parents[2]), str(here.parent), str(here.parents[1] / "train")])


def _main(request: str, answer: str) -> None:
    import torch

    import clicktrain.cli
    import clicktrain.compiler
    import clicktrain.train  # noqa: F401

    torch.set_num_threads(1)
    cases = {name: Case(**fields) for name, fields in json.loads(Path(request).read_text()).items()}
    outcomes = {name: vars(_in_fork(case)) for name, case in cases.items()}
    Path(answer).write_text(json.dumps(outcomes))


def _in_fork(case: Case) -> Outcome:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            signal.alarm(case.seconds)
            with os.fdopen(writer, "w") as file:
                file.write(json.dumps(vars(_carry_out(case))))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return Outcome(signal=os.WTERMSIG(status))
    return Outcome(**json.loads(text)) if text else Outcome(error="the process ended without a word")


def _carry_out(case: Case) -> Outcome:
    outcome = Outcome()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for name, value in case.environment.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            tempfile.tempdir = None  # what TMPDIR was before does not count
            if case.mount is not None and not _mount(*case.mount):
                return Outcome(skipped="file systems cannot be mounted here")
            if case.damage is not None:
                damage_cache(Path(os.environ["CLICKTRAIN_KERNEL_CACHE"]), *case.damage)
            if case.file_size is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (case.file_size, case.file_size))
            outcome.result = ACTIONS[case.action](*case.arguments)
        except BaseException:
            outcome.error = traceback.format_exc()
    outcome.warnings = [str(one.message) for one in caught]
    return outcome


def damage_cache(cache: Path, kind: str, which: str) -> None:
    """Damage one library of a cache, or all."""
    libraries = sorted(cache.glob("*.so"))
    assert libraries, "there is nothing to damage"
    for library in libraries if which == "all" else [libraries[int(which) % len(libraries)]]:
        if library.exists():
            DAMAGES[kind](library)


def _mount(folder: str, how: str) -> bool:
    """Give this process a file system of its own at a folder; False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
        return False
    flags = {"noexec": _MS_NOEXEC, "ro": _MS_RDONLY}.get(how, 0)
    options = b"" if flags else f"size={how}".encode()
    return not libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, options)


# ---------------------------------------------------------------- actions


def pruned_network() -> tuple[Any, Any]:
    """A packed network and a batch for it."""
    import torch
    from torch import nn

    from clicktrain.kernels.pack_model import pack_model_

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )
    pack_model_(model, {"3": torch.rand(8, 8, 3, 3) < 0.3})
    return model, torch.randn(8, 3, 6, 6)


def accelerate_network(rule: str = "sparse") -> dict[str, Any]:
    """One training step before and after: whether it is the same, and how many convolutions run blocked."""
    import torch

    import clicktrain

    model, x = pruned_network()

    def step(network: Any) -> list[Any]:
        model.zero_grad()
        y = network(x)
        (y * torch.arange(3.0)).sum().backward()
        return [y.detach().clone(), *(p.grad.clone() for p in model.parameters())]

    expected = step(model)
    fast = clicktrain.accelerate(model, x, rule=rule)
    found = step(fast)
    same = all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(expected, found, strict=True))
    plan = getattr(fast, "plan", None)
    blocked = (
        [] if plan is None else [c.layer for c in plan.choices if c.kind == "conv" and c.layout == "blocked"]
    )
    return {"same": same, "accelerated": plan is not None and fast.active, "blocked": blocked}


def run_kernel(number: int, cut_after_build: str = "") -> int:
    """A kernel that returns a number; perhaps its library is damaged between being built and loaded."""
    from clicktrain.kernels.native import build, load

    text = f"int run(void) {{ return {number}; }}\n"
    if cut_after_build:
        DAMAGES[cut_after_build](build(text))
    return int(load(text).run())


def command_line(*arguments: str) -> dict[str, Any]:
    """``clicktrain`` with these arguments: exit code, and what it printed."""
    from clicktrain.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def train(path: str, settings: Mapping[str, Any], stop_at: int = 0) -> dict[str, Any]:
    """A training run, perhaps ended in the middle; what it told, and its summary."""
    import short_runs

    progress = short_runs.At(stop_at, short_runs.kill)
    try:
        summary = short_runs.run(Path(path), settings, progress)
    except short_runs.Killed:
        summary = {}
    return {"messages": progress.messages, "summary": summary}


def resume(path: str) -> dict[str, Any]:
    """Go on with a run that was ended."""
    import short_runs

    progress = short_runs.Messages()
    return {"summary": short_runs.resume(Path(path), progress), "messages": progress.messages}


ACTIONS: Mapping[str, Callable[..., Any]] = {
    "accelerate": accelerate_network,
    "kernel": run_kernel,
    "command line": command_line,
    "train": train,
    "resume": resume,
}


if __name__ == "__main__":
    _main(*sys.argv[1:])
