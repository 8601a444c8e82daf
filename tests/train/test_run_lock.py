"""One process at a time trains in a folder, and a process that was killed locks nothing."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from short_runs import DENSE, At, Killed, assert_same_run, kill, resume, run

from clicktrain.errors import UserError
from clicktrain.runs.lock import LOCK_NAME, holder, locked
from clicktrain.train import (
    RunFolder,
    RunFolderInUse,
    TrainingInterrupted,
    config_to_dict,
    from_dict,
    load_run,
)


@contextmanager
def another_process(folder: Path, *, loads_data: bool = False) -> Iterator[int]:
    """That holds the lock of a folder until it is killed; a fork, which needs no second import of PyTorch.

    ``loads_data``: it has a child, as one that loads data, which lives on.
    """
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        process = os.fork()
    if process == 0:
        try:
            os.setsid()
            with locked(folder, print):
                if loads_data and os.fork() == 0:
                    time.sleep(600)
                    os._exit(0)
                os.write(write, b"held")
                time.sleep(600)
        finally:
            os._exit(1)
    try:
        assert os.read(read, 4) == b"held"
        yield process
    finally:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(read)
        os.close(write)


def interrupted(path: Path) -> Path:
    with pytest.raises(Killed):
        run(path, DENSE, At(13, kill))
    return path


def test_a_second_process_is_refused_and_reading_goes_on(tmp_path: Path) -> None:
    path = interrupted(tmp_path / "run")
    with another_process(path) as other:
        name = f"process {other} on {socket.gethostname()}"
        assert holder(path) == name
        with pytest.raises(RunFolderInUse, match=f"is in use: {name} trains in it; wait"):
            resume(path)
        with pytest.raises(RunFolderInUse, match=f"is in use: {name} trains in it; give another --out"):
            run(path, DENSE)
        with pytest.raises(UserError, match=f"is not finished: {name} is training it"):
            load_run(path)
        assert len(RunFolder(path).read_metrics()) == 1
    assert holder(path) is None
    with pytest.raises(UserError, match="is not finished: continue it"):
        load_run(path)
    resume(path)


@pytest.mark.parametrize("loads_data", [False, True])
def test_a_killed_process_locks_nothing(tmp_path: Path, loads_data: bool) -> None:
    with another_process(tmp_path, loads_data=loads_data) as other:
        with pytest.raises(RunFolderInUse), locked(tmp_path, print):
            pass
        os.kill(other, signal.SIGKILL)
        os.waitid(os.P_PID, other, os.WEXITED | os.WNOWAIT)
        assert (tmp_path / LOCK_NAME).read_text() == f"process {other} on {socket.gethostname()}\n"
        assert holder(tmp_path) is None
        with locked(tmp_path, print):
            assert holder(tmp_path) == f"process {os.getpid()} on {socket.gethostname()}"
    assert list(tmp_path.iterdir()) == []


def test_two_runs_of_one_process_are_refused_too(tmp_path: Path) -> None:
    refused: list[str] = []

    def start_again() -> None:
        for go_on in (lambda: run(tmp_path / "run", DENSE), lambda: resume(tmp_path / "run")):
            with pytest.raises(RunFolderInUse, match=f"process {os.getpid()} on") as error:
                go_on()
            refused.append(str(error.value))

    run(tmp_path / "run", {**DENSE, "epochs": 1}, At(3, start_again))
    assert len(refused) == 2
    assert RunFolder(tmp_path / "run").summary() is not None


def test_of_many_that_start_at_once_one_gets_the_folder(tmp_path: Path) -> None:
    """And those that are refused take nothing of it away."""
    config, method = from_dict(DENSE)
    inside, refused, most = [0], [0], [0]
    gate = threading.Barrier(8)

    def take() -> None:
        gate.wait()
        try:
            with RunFolder(tmp_path / "runs" / "one").in_use(print, new=True):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                RunFolder(tmp_path / "runs" / "one").create(config_to_dict(config, method))
                time.sleep(0.2)
                (RunFolder(tmp_path / "runs" / "one").checkpoint(1, 0)).touch()
                inside[0] -= 1
        except UserError:
            refused[0] += 1

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most[0], refused[0]) == (1, 7)
    assert RunFolder(tmp_path / "runs" / "one").config.exists()


def test_a_lock_whose_file_was_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a process's open and its lock, the holder ends and a third process takes the folder."""
    holding, third, lock = ExitStack(), ExitStack(), fcntl.flock
    holding.enter_context(locked(tmp_path, print))

    def late(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        holding.close()
        third.enter_context(locked(tmp_path, print))
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(RunFolderInUse), locked(tmp_path, print):
        pass
    third.close()
    assert list(tmp_path.iterdir()) == []


def test_threads_that_take_turns(tmp_path: Path) -> None:
    inside: list[int] = []

    def take(number: int) -> None:
        for _ in range(50):
            try:
                with locked(tmp_path, print):
                    inside.append(number)
                    assert inside == [number]
                    inside.clear()
            except RunFolderInUse:
                pass

    threads = [threading.Thread(target=take, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == []
    assert list(tmp_path.iterdir()) == []


def test_another_run_beside_a_refused_one_stays(tmp_path: Path) -> None:
    """What is taken back is this run's folder alone, although its parent was made for it."""

    def fail(taken: RunFolder, beside: Path | None) -> None:
        with taken.in_use(print, new=True):
            if beside is not None:
                beside.mkdir()
            raise UserError("no space")

    with pytest.raises(UserError, match="no space"):
        fail(RunFolder(tmp_path / "runs" / "mine"), tmp_path / "runs" / "other")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]
    with pytest.raises(UserError, match="no space"):
        fail(RunFolder(tmp_path / "a" / "b" / "c"), None)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_signals_that_come_together_are_one(tmp_path: Path) -> None:
    """A terminal that closes sends several: one checkpoint is written, and the first one's code returned."""
    path = interrupted(tmp_path / "run")
    echo = At(14, lambda: [os.kill(os.getpid(), s) for s in (signal.SIGHUP, signal.SIGTERM)])  # type: ignore[arg-type,return-value]
    with pytest.raises(TrainingInterrupted, match="state saved in") as stopped:
        resume(path, echo)
    assert stopped.value.exit_code == 128 + signal.SIGHUP
    resume(path)
    run(tmp_path / "whole", DENSE)
    assert_same_run(path, tmp_path / "whole")


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """As under nohup, or in the background of a shell."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(tmp_path / "run", {**DENSE, "epochs": 1}, At(3, lambda: os.kill(os.getpid(), signal.SIGHUP)))
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert RunFolder(tmp_path / "run").summary() is not None
