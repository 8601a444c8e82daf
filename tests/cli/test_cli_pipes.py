"""Output that nobody reads: a run goes on, other commands end quietly."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest
from cli_runs import TINY, Outcome, call

from clicktrain.cli import main
from clicktrain.runs.lock import locked
from clicktrain.train import RunFolder


@contextlib.contextmanager
def broken_pipe() -> Iterator[TextIO]:
    """As ``| true`` leaves it."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        yield stream


def full_disk() -> contextlib.AbstractContextManager[TextIO]:
    return open("/dev/full", "w")


def closed() -> contextlib.AbstractContextManager[None]:
    """As ``>&-`` leaves it."""
    return contextlib.nullcontext(None)


def call_into(
    output: Callable[[], contextlib.AbstractContextManager[TextIO | None]], *arguments: object
) -> Outcome:
    error = io.StringIO()
    with output() as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(error):
        code = main([str(argument) for argument in arguments])
    return Outcome(code, "", error.getvalue())


@pytest.mark.parametrize(
    ("output", "reason"),
    [(broken_pipe, "Broken pipe"), (full_disk, "No space left on device"), (closed, None)],
)
def test_a_run_goes_on_without_its_screen(
    tmp_path: Path, output: Callable[[], contextlib.AbstractContextManager[TextIO | None]], reason: str | None
) -> None:
    path = tmp_path / "run"
    outcome = call_into(output, "train", *TINY, "--method", "dense", "--epochs", "2", "--out", path)
    assert outcome.code == 0
    told = f"the output cannot be written any more ({reason}): the run goes on without it, in {path}"
    assert outcome.err == ("" if reason is None else f"clicktrain: {told}\n")
    assert len(RunFolder(path).read_metrics()) == 2
    assert RunFolder(path).summary() is not None


@pytest.mark.parametrize("arguments", [("inspect",), ("inspect", "--json"), ("evaluate",), ("report",)])
def test_other_commands_end_quietly(copy_of_finished: Callable[[], Path], arguments: tuple[str, ...]) -> None:
    path = copy_of_finished()
    outcome = call_into(broken_pipe, arguments[0], path, *arguments[1:])
    assert outcome == Outcome(141, "", "")
    outcome = call_into(full_disk, arguments[0], path, *arguments[1:])
    assert outcome.code == 2
    assert (
        outcome.err == "clicktrain: error: no space left to write the output: free some space and try again\n"
    )


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_ends_quietly(argument: str) -> None:
    assert call_into(broken_pipe, argument) == Outcome(141, "", "")


def test_a_folder_in_use_is_refused_in_one_line(
    finished: tuple[Path, Outcome], copy_of_finished: Callable[[], Path]
) -> None:
    path = copy_of_finished()
    (path / "summary.json").unlink()  # killed before its end
    with locked(path, print):
        for arguments in (("resume", path), ("train", *TINY, "--out", path)):
            outcome = call(*arguments)
            assert outcome.code == 2
            assert outcome.err.startswith(f"clicktrain: error: {path} is in use: process {os.getpid()} on ")
            assert outcome.err.count("\n") == 1
        for command in ("inspect", "evaluate", "export"):
            extra = ("--format", "safetensors") if command == "export" else ()
            outcome = call(command, path, *extra)
            assert outcome.code == 2
            assert "is training it" in outcome.err
        assert call("report", path).code == 0
    outcome = call("resume", path, "--no-report")
    assert outcome.code == 0, outcome.err
    assert call("inspect", path, "--json").out == call("inspect", finished[0], "--json").out.replace(
        str(finished[0]), str(path)
    )
