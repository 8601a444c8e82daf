"""Cases of the fuzz: what is tried, and what counts as right.

Right is a complete result, or a refusal: exit code 2 (a `UserError` in Python) with one sentence, and nothing
else changed. Wrong is everything else: a traceback, another exit code, a hang, files half written, code run
that nobody named, a result where there can be none.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import torch

from clicktrain.cli import main
from clicktrain.errors import UserError

PREFIX = "clicktrain: error: "
LONGEST = 600
"""Characters of a sentence: 400 and room for the paths of temporary folders."""
SECONDS = 180
"""Wall clock, on a machine that may be busy: what takes this long waits for something, or has no end."""
CANARY = "code_was_run"
"""A file of this name appears in the current folder where code runs that nobody has named."""
Expected = Literal["either", "refused", "accepted"]
DATA = "synthetic:classes=2,size=8,channels=1,train=16,val=8"
TINY = ("--model", "resnet8", "--width", "0.1", "--data", DATA, "--batch-size", "8", "--threads", "1")


@dataclass(frozen=True)
class Case:
    """One thing to try.

    Attributes:
        category: flags, yaml, run folders, data, factories or own loops.
        what: a line for people.
        act: given an empty folder, which is the current one: returns the arguments of a command line, or does
            its work in Python itself (None), where a UserError is a refusal.
        expected: what is right for it.
    """

    category: str
    what: str
    act: Callable[[Path], list[str] | None]
    expected: Expected = "either"


@dataclass(frozen=True)
class Verdict:
    """What came of a case; ``why`` is empty where it is right."""

    case: Case
    refused: bool
    why: str

    @property
    def right(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.why


class Hang(BaseException):
    """The time of a case is over."""


def judge(case: Case) -> Verdict:
    """Try a case in a folder of its own."""
    with _place() as place:
        state = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
        try:
            with _time_limit(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                refused, why = _try(case, place)
        except Hang:
            refused, why = False, f"no end within {SECONDS} s"
        finally:
            torch.set_rng_state(state[0])
            random.setstate(state[1])
            torch.set_num_threads(state[2])
        if not why and (place / CANARY).exists():
            why = "code ran that nobody had named"
    if not why and case.expected != "either" and refused != (case.expected == "refused"):
        why = f"should be {case.expected}"
    return Verdict(case, refused, why)


def _try(case: Case, place: Path) -> tuple[bool, str]:
    """Whether it was refused, and what is wrong."""
    out, err = io.StringIO(), io.StringIO()
    argv: list[str] | None = None
    code, before = 0, files_below(place)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            argv = case.act(place)
            if argv is not None:
                before = files_below(place)
                code = main(argv)
        except UserError as error:
            if argv is not None:
                return False, "a UserError passed through the command line"
            return True, _wrong_sentence(str(error))
        except SystemExit as stop:
            return False, f"SystemExit {stop.code}"
        except Hang:
            raise
        except BaseException as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:160]
            return False, f"{type(error).__name__}: {text} ({Path(frame.filename).name}:{frame.lineno})"
    if argv is None:
        return False, ""
    return (code == 2, _wrong_refusal(err.getvalue(), before, place)) if code == 2 else (
        False, _wrong_result(code, argv, place))  # fmt: skip


def _wrong_refusal(err: str, before: dict[str, tuple[int, int]], place: Path) -> str:
    lines = [line for line in err.splitlines() if line.startswith(PREFIX)]
    if len(lines) != 1 or "Traceback" in err:
        return f"not one sentence: {err[:200]!r}"
    after = files_below(place)
    if after != before:
        changed = sorted(set(after.items()) ^ set(before.items()))
        return f"refused, but changed {changed[0][0]}"
    return _wrong_sentence(lines[0].removeprefix(PREFIX))


def _wrong_sentence(text: str) -> str:
    if not text.strip() or "\n" in text.strip():
        return f"not one line: {text[:200]!r}"
    if len(text) > LONGEST:
        return f"{len(text)} characters: {text[:100]!r}"
    return ""


def _wrong_result(code: int, argv: list[str], place: Path) -> str:
    if code != 0:
        return f"exit code {code}"
    if argv[:1] == ["train"] and "--out" in argv and "--dry-run" not in argv and "--help" not in argv:
        out = Path(argv[argv.index("--out") + 1])
        if not (out / "summary.json").is_file():
            return "exit code 0 without a summary"
    return ""


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with size and time of change, links not followed."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(parent, name))
            is_file = name in files
            path = os.path.relpath(os.path.join(parent, name), folder)
            if "__pycache__" not in path:
                found[path] = (status.st_size if is_file else -1, status.st_mtime_ns if is_file else 0)
    return found


@functools.cache
def cache_folder() -> str:
    """A folder for caches, one for all cases: a process looks for it once."""
    folder = tempfile.mkdtemp(prefix="fuzz-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    """An empty current folder."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    before, modules, path = os.getcwd(), set(sys.modules), list(sys.path)
    environment = {"XDG_CACHE_HOME": cache_folder(), "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    old = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    (root / "place").mkdir()
    os.chdir(root / "place")
    try:
        yield root / "place"
    finally:
        os.chdir(before)
        for name, value in old.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if name.startswith("fuzzed"):
                del sys.modules[name]
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
