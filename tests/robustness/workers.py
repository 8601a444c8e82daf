"""Forks launchers: PyTorch's own, whose workers are forks too, so that PyTorch is imported once.

Each worker runs a command line. What one of them does wrong in the middle of training is asked for by
`Trouble`, in the environment of all, and done by the network ``workers:troubled`` of the process itself.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from clicktrain.cli import main as clicktrain_main

for module in ("commands.train", "commands.resume", "commands.progress", "train", "compiler"):
    importlib.import_module(f"clicktrain.{module}")  # now, not in every fork
importlib.import_module("torch._dynamo")  # by the first optimizer, and as slow as the rest of PyTorch


@dataclass(frozen=True)
class Trouble:
    """What process ``rank`` does at training step ``step``, in its first life."""

    kind: str
    rank: int = 1
    step: int = 3

    @property
    def environment(self) -> dict[str, str]:
        return {"TROUBLE": self.kind, "TROUBLE_RANK": str(self.rank), "TROUBLE_STEP": str(self.step)}


def run_launcher(
    words: Sequence[str], processes: int, restarts: int, log: Path, environment: Mapping[str, str]
) -> int:
    """Run ``clicktrain WORDS`` in several processes, to the end, as ``--processes`` does; the exit code.

    ``WORKER_WORDS_1`` in the environment are further words for process 1, and so on.
    """
    launcher = os.fork()
    if launcher:
        return os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1])
    os.environ |= environment
    os._exit(lead(words, processes, restarts, log))


def lead(words: Sequence[str], processes: int, restarts: int, log: Path) -> int:
    """Be the launcher."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    import logging

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id=uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=restarts, monitor_interval=0.05, start_method="fork",
    )  # fmt: skip
    try:
        elastic_launch(config, work)(*words)
    except ChildFailedError as failed:
        code = int(failed.get_first_failure()[1].exitcode)
        return code if code > 0 else 128 - code
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def work(*words: str) -> None:
    """Be a worker."""
    code = 1
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in a process that is no fork of the launcher
    try:
        torch.set_num_threads(1)
        more = os.environ.get(f"WORKER_WORDS_{os.environ['RANK']}", "").split()
        code = clicktrain_main([*words, *more])
        sys.stdout.flush()
    except BaseException:  # what Python itself would do
        traceback.print_exc()
    if code:
        os._exit(code)  # else the launcher waits for what this returns


class Troubled(nn.Sequential):
    """A small network, in which one process goes wrong at one step."""

    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.steps += 1
            asked = (os.environ.get("TROUBLE_RANK"), os.environ.get("TROUBLE_STEP"))
            first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
            if first_life and asked == (os.environ.get("RANK"), str(self.steps)):
                x = go_wrong(os.environ["TROUBLE"], x)
        output: Tensor = super().forward(x)
        return output


def go_wrong(kind: str, x: Tensor) -> Tensor:
    if kind == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher would wait for half a minute
        while True:
            time.sleep(0.1)
    elif kind == "stop":
        if os.fork() == 0:  # the launcher would wait for half a minute
            time.sleep(12)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "memory":
        torch.empty(1 << 50)
    elif kind == "nan":
        return x * float("nan")
    elif kind == "exception":
        raise ZeroDivisionError("in a network of somebody's own")
    return x


def troubled(num_classes: int, in_channels: int) -> nn.Module:
    return Troubled(
        nn.Conv2d(in_channels, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )
