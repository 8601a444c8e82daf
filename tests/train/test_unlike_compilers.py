"""A process whose compiler fails trains on, slowly: the first process, which speaks for all, says so."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from clicktrain.kernels.native import toolchain

TRAIN = ["--data", "digits", "--model", "resnet8", "--width", "0.25", "--epochs", "2", "--no-report",
         "--method", "rigl", "--granularity", "pattern", "--compression", "4",
         "--operators", "density", "--process-timeout", "60"]  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(toolchain() is None, reason="there is no C compiler")
def test_the_first_process_says_which_other_one_has_no_kernels(tmp_path: Path) -> None:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    common["MASTER_PORT"] = str(port)
    own = [{"RANK": "0", "LOCAL_RANK": "0"}, {"RANK": "1", "LOCAL_RANK": "1", "CC": "false"}]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "clicktrain", "train", *TRAIN, "--out", str(tmp_path / "run")],
            env={**os.environ, **common, **variables, "XDG_CACHE_HOME": str(tmp_path / f"cache{rank}")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, variables in enumerate(own)
    ]
    try:
        first, other = (process.communicate(timeout=300)[0] for process in running)
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], first + other
    assert "process 1: the packed model runs on the reference operator" in " ".join(first.split()), first
    assert other == "", "only the first one speaks"
