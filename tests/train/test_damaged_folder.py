"""A run's folder that was killed half made, changed, filled up or removed: a sentence, and nothing lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from short_runs import DENSE, At, Killed, Messages, assert_same_run, kill, resume, run, weights

from clicktrain.errors import UserError
from clicktrain.formats.atomic import append_jsonl
from clicktrain.runs.format import FORMAT_VERSION, HEADER
from clicktrain.runs.new_folder import only_begun
from clicktrain.train import RunFolder, TrainingInterrupted, config_to_dict, from_dict
from clicktrain.train.checkpoint import load_checkpoint


def interrupted(path: Path, batch: int = 13, **settings: Any) -> RunFolder:
    with pytest.raises(Killed):
        run(path, {**DENSE, **settings}, At(batch, kill))
    return RunFolder(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    run(path, DENSE)
    return path


# ---- killed while the folder is made -----------------------------------------------------------------


def killed_at_change(number: int, path: Path, action: Callable[[], object]) -> bool:
    """Whether a process was killed at its n-th change of a file below a path (it makes fewer otherwise)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads
        process = os.fork()
    if process == 0:
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            changes = event in ("os.rename", "os.mkdir", "os.remove") or (
                event == "open" and arguments[2] & 3
            )
            if (
                changes
                and isinstance(arguments[0], (str, os.PathLike))
                and str(arguments[0]).startswith(str(path))
            ):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(hook)
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL


def begin(path: Path) -> None:
    """What a run does before its first checkpoint is there."""
    config, method = from_dict(DENSE)
    folder = RunFolder(path)
    with folder.in_use(print, new=True):
        folder.create(config_to_dict(config, method))
        append_jsonl(folder.events, {"event": "stage", "epoch": 0})
        folder.checkpoint(1, 0).with_name(f".step-0-epoch-0.safetensors.{os.getpid()}-01234567.tmp").touch()
        os._exit(0)


def test_a_run_killed_while_its_folder_is_made_can_be_started_again(tmp_path: Path) -> None:
    config, method = from_dict(DENSE)
    left: set[tuple[str, ...]] = set()
    for number in range(1, 100):
        path = tmp_path / f"run-{number}"
        if not killed_at_change(number, path, lambda path=path: begin(path)):  # type: ignore[misc]
            break
        left.add(tuple(sorted(str(p.relative_to(path)) for p in path.rglob("*"))))
        if path.exists() and any(path.iterdir()) and not (path / "config.yaml").exists():
            with pytest.raises(UserError, match=r"(only the beginnings of a run|is not the folder of a run)"):
                RunFolder(path).open()
        folder = RunFolder(path)
        folder.check_free()
        with folder.in_use(print, new=True):
            folder.create(config_to_dict(config, method))
            folder.checkpoint(1, 0).touch()
        made = {"checkpoints", "config.yaml", "events.jsonl", "metrics.jsonl"}
        assert {p.name for p in path.iterdir()} == made
        assert folder.read_events() == []
    assert number > 8
    assert len(left) > 5  # they were killed at different states


def test_a_whole_run_in_a_folder_that_holds_the_beginnings(tmp_path: Path, whole: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    killed_at_change(100, path, lambda: begin(path))
    assert {p.name for p in path.iterdir()} == {
        ".lock", "checkpoints", "config.yaml", "events.jsonl", "metrics.jsonl",
    }  # fmt: skip
    run(path, DENSE)
    assert_same_run(path, whole)
    assert not any(p.name.startswith(".") for p in path.rglob("*"))


@pytest.mark.parametrize(
    "files",
    [
        {"config.yaml": "epochs: 3\n"},
        {"config.yaml": f"{HEADER}{FORMAT_VERSION}\nepochs: 3\n"},
        {"notes.txt": ""},
        {"checkpoints/mine.safetensors": "x"},
        {"metrics.jsonl": '{"epoch": 1}\n'},
        {"events.jsonl": '{"event": "mine"}\n'},
        {"checkpoints": "a file"},
    ],
    ids=["recipe", "copied recipe", "note", "weights", "metrics", "events", "file"],
)
def test_files_of_the_users_are_no_beginnings(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert not only_begun(tmp_path)
    with pytest.raises(UserError, match=r"(is not empty|already holds a run)"):
        run(tmp_path, DENSE)
    assert {name: (tmp_path / name).read_text() for name in files} == files
    assert not (tmp_path / ".lock").exists()


def test_leftovers_of_killed_writers_go_and_others_stay(tmp_path: Path, whole: Path) -> None:
    folder = interrupted(tmp_path / "run")
    dead = 2**22 + 5  # above the largest process number of Linux
    gone = [
        folder.path / f".summary.json.{dead}-0a1b2c3d.tmp",
        folder.checkpoint_folder / f".step.{dead}-01234567.tmp",
    ]
    stay = [folder.path / f".report.html.{os.getppid()}-0a1b2c3d.tmp", folder.path / ".mine.tmp"]
    for path in (*gone, *stay):
        path.write_text("half")
    resume(folder.path)
    assert [path for path in gone if path.exists()] == []
    assert [path for path in stay if not path.exists()] == []
    for path in stay:
        path.unlink()
    assert_same_run(folder.path, whole)


# ---- logs that are not what the checkpoint knew ------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace("0.", "1.", 1))


def remove_a_line(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))


def garble(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"\xff\x00{]\n", *lines[1:]]))


@pytest.mark.parametrize("log", ["metrics.jsonl", "events.jsonl"])
@pytest.mark.parametrize(
    ("damage", "lost"), [(cut, 1), (edit, 0), (remove_a_line, 1), (garble, 0), (Path.unlink, None)]
)
def test_a_log_that_was_changed_is_reported_and_put_aside(
    tmp_path: Path, log: str, damage: Callable[[Path], Any], lost: int | None
) -> None:
    settings = {
        "operators": "reference",
        "method": "campfire",
        "sparsity": 0.6,
        "era": (0, 2),
        "epochs": 4,
        "model": "tiny_networks:tiny",
    }
    folder = interrupted(tmp_path / "run", batch=36, **settings)
    marks = load_checkpoint(folder.checkpoints()[-1])["state"]["logs"]
    path = folder.path / log
    whole = path.read_bytes()[: marks[log]["num_bytes"]]
    lines = whole.count(b"\n")
    assert lines >= 2
    path.write_bytes(whole)  # what follows the checkpoint goes anyway
    damage(path)
    found = path.read_bytes() if path.exists() else None
    messages = Messages()
    resume(folder.path, messages)
    kept = 0 if lost is None else lines - lost
    aside = folder.path / log.replace(".jsonl", ".damaged-1.jsonl")
    assert len(messages.messages) == 1
    assert str(path) in messages.messages[0]
    assert f"{kept} of its lines stay, and training goes on" in messages.messages[0]
    assert (aside.read_bytes() if aside.exists() else None) == found
    (event,) = [event for event in folder.read_events() if event["event"] == "log_mended"]
    assert (event["file"], event["lines_kept"], event["epoch"]) == (log, kept, 3)
    assert [line["epoch"] for line in folder.read_metrics()][-1] == 4
    for line in path.read_text().splitlines():
        json.loads(line)
    run(tmp_path / "whole", {**DENSE, **settings})
    assert all((weights(folder.path)[k] == v).all() for k, v in weights(tmp_path / "whole").items())


def test_lines_after_the_checkpoint_are_no_damage(tmp_path: Path, whole: Path) -> None:
    folder = interrupted(tmp_path / "run")
    append_jsonl(folder.metrics, {"epoch": 2})
    append_jsonl(folder.events, {"event": "later", "epoch": 1.5})
    messages = Messages()
    resume(folder.path, messages)
    assert messages.messages == []
    assert_same_run(folder.path, whole)


# ---- checkpoints -------------------------------------------------------------------------------------


def test_a_damaged_newest_checkpoint_does_not_outlive_good_ones(tmp_path: Path) -> None:
    """It has the highest number; what is written after going back to an older one must not go instead."""
    folder = interrupted(tmp_path / "run", batch=30, epochs=4)
    newest = folder.checkpoints()[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    config = folder.config
    config.write_text(config.read_text().replace("keep_checkpoints: 2", "keep_checkpoints: 1"))
    with pytest.raises(Killed):
        resume(folder.path, At(14, kill))  # after the older checkpoint, before the damaged one's step
    assert newest in folder.checkpoints()
    with pytest.raises(TrainingInterrupted):
        resume(folder.path, At(15, lambda: signal.raise_signal(signal.SIGINT)))
    assert [path.name for path in folder.checkpoints()] == ["step-000000015-epoch-0002.safetensors"]
    load_checkpoint(folder.checkpoints()[0])


# ---- the disk ----------------------------------------------------------------------------------------


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """A function: from now on no file may grow beyond that size; the operating system refuses the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_stops_the_run_at_its_last_good_state(
    tmp_path: Path, whole: Path, small_disk: Callable[[int], None]
) -> None:
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=r"no space left on the disk while writing .*checkpoints"):
        run(folder.path, DENSE, At(13, lambda: small_disk(5000)))
    assert sorted(path.name for path in folder.checkpoint_folder.iterdir()) == [
        "step-000000000-epoch-0000.safetensors", "step-000000011-epoch-0001.safetensors",
    ]  # fmt: skip
    assert not (folder.path / ".lock").exists()
    small_disk(resource.RLIM_INFINITY)
    resume(folder.path)
    assert_same_run(folder.path, whole)


def test_a_disk_that_is_full_at_once_leaves_no_folder(
    tmp_path: Path, small_disk: Callable[[int], None]
) -> None:
    small_disk(4000)
    with pytest.raises(UserError, match="no space left on the disk"):
        run(tmp_path / "runs" / "one", DENSE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [shutil.rmtree, lambda path: path.rename(path.with_name("moved"))])
def test_a_folder_that_goes_away_stops_the_run_in_a_sentence(
    tmp_path: Path, how: Callable[[Path], Any]
) -> None:
    path = tmp_path / "run"
    with pytest.raises(UserError, match=r"run, is gone \(deleted, moved or unmounted\): training stopped"):
        run(path, DENSE, At(13, lambda: how(path)))
    assert not path.exists()


# ---- places ------------------------------------------------------------------------------------------


def loop(folder: Path) -> Path:
    (folder / "a").symlink_to(folder / "b")
    (folder / "b").symlink_to(folder / "a")
    return folder / "a" / "run"


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        (lambda folder: Path("/dev/null"), "/dev/null is a file: give a folder as --out"),
        (lambda folder: Path("/dev/null/run"), "cannot make the folder /dev/null/run: Not a directory"),
        (lambda folder: folder / ("x" * 300), r"cannot be the folder of a run: File name too long"),
        (
            lambda folder: folder / "/".join(["x" * 200] * 30),
            r"characters\) cannot be the folder of a run: File name",
        ),
        (loop, "cannot be the folder of a run: Too many levels of symbolic links"),
        (lambda folder: Path("/proc/run"), "(cannot make the folder /proc/run: No such file|0 MB are free)"),
        (lambda folder: folder / "a\0b", "cannot be the folder of a run: embedded null byte"),
    ],
    ids=["device", "in a device", "name", "path", "loop", "read-only", "null"],
)
def test_places_that_no_folder_can_be_at(
    tmp_path: Path, place: Callable[[Path], Path], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        run(place(tmp_path), DENSE)
    with pytest.raises(UserError):
        resume(place(tmp_path) if place is not loop else tmp_path / "a" / "run")
