"""``--processes``: the command starts itself several times, and speaks once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from clicktrain.comm.processes import ALONE, Processes, launched
from clicktrain.commands.processes import check, without
from clicktrain.errors import UserError

TINY = (
    "--data synthetic:classes=3,size=8,train=32,val=8 --model resnet8 --width 0.25 --epochs 2 --method dense"
)


def clicktrain(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "clicktrain", *arguments],
        capture_output=True, text=True, timeout=240, env={**own, **environment}, check=False,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
def test_two_processes_train_one_run_and_a_mistake_is_said_once(tmp_path: Path) -> None:
    done = clicktrain(
        "train", *TINY.split(), "--batch-size", "16", "--processes", "2", "--out", str(tmp_path / "run")
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1
    assert (tmp_path / "run" / "summary.json").is_file()
    again = clicktrain("resume", str(tmp_path / "run"), "--processes", "2")
    assert again.returncode == 0
    assert "is finished already" in again.stdout
    wrong = clicktrain(
        "train", *TINY.split(), "--batch-size", "1", "--processes", "2", "--out", str(tmp_path / "odd")
    )
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines() == [
        "clicktrain: error: 2 processes cannot share batches of 1 images: give a batch_size of at least 2"
    ]
    assert not (tmp_path / "odd").exists()


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found in /proc")
def test_a_killed_process_makes_all_begin_again(tmp_path: Path) -> None:
    words = [
        "--data",
        "digits",
        "--model",
        "resnet8",
        "--width",
        "0.25",
        "--epochs",
        "4",
        "--batch-size",
        "128",
    ]
    words += ["--method", "clicktrain", "--compression", "4", "--operators", "reference", "--processes", "2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert clicktrain("train", *words, "--out", str(whole)).returncode == 0
    launcher = subprocess.Popen(
        [sys.executable, "-m", "clicktrain", "train", *words, "--restarts", "1", "--out", str(killed)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 120
        lines = killed / "metrics.jsonl"
        while time.monotonic() < until and not (lines.is_file() and lines.read_text().count("\n")):
            time.sleep(0.02)
        workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        said, _ = launcher.communicate(timeout=240)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, said
    assert said.count("epoch 4/4") == 1
    assert "waits in vain for the others" in said or said.count("digits: 1,442") == 2
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    epochs = [json.loads(line)["epoch"] for line in lines.read_text().splitlines()]
    assert epochs == [1, 2, 3, 4]


def test_flags_of_the_launcher_are_not_passed_on() -> None:
    argv = ["--epochs", "2", "--processes", "4", "--restarts=3", "--out", "runs/a"]
    assert without(argv) == ["--epochs", "2", "--out", "runs/a"]


@pytest.mark.parametrize(
    ("processes", "restarts", "message"),
    [(0, 0, "processes is 0"), (2, -1, "restarts is -1"), (1, 2, "give --processes too")],
)
def test_impossible_numbers_are_refused(processes: int, restarts: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(processes, restarts)


def test_what_the_launcher_says_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == ALONE
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert launched() == Processes(rank=3, number=4, local_rank=1, local_number=2)
    with pytest.raises(UserError, match="one of several processes already"):
        check(2, 0)
    monkeypatch.setenv("LOCAL_RANK", "one")
    with pytest.raises(UserError, match="LOCAL_RANK is 'one' in the environment"):
        launched()
