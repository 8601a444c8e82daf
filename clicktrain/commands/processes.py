"""``--processes N``: the same command in several processes, started as ``torchrun`` starts them."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from uuid import uuid4

from clicktrain.comm.processes import TIMEOUT_S, launched
from clicktrain.commands.arguments import Option
from clicktrain.errors import UserError

LAUNCHER = (
    Option(
        "processes",
        int,
        "Processes on this machine that train together, each on its part of every batch; for several "
        "machines there is torchrun.",
        1,
        metavar="N",
        main=False,
    ),
    Option(
        "restarts",
        int,
        "How often all processes may begin again from the last checkpoint after one of them has died.",
        0,
        metavar="N",
        main=False,
    ),
)
"""Flags that are the launcher's."""
PROCESSES = (
    *LAUNCHER,
    Option(
        "process_timeout",
        float,
        "Seconds that processes wait for one that does not arrive; where one works for all, as it measures "
        "operators, they wait for half an hour if that is longer.",
        TIMEOUT_S,
        metavar="SECONDS",
        main=False,
    ),
)
"""Flags of commands that train."""


def check(processes: int, restarts: int, timeout_s: float = TIMEOUT_S) -> None:
    """UserError for numbers that make no sense, or in a process that was launched already."""
    if not 0 < timeout_s < math.inf:
        raise UserError(f"process_timeout is {timeout_s}: must be above 0 seconds")
    if processes < 1:
        raise UserError(f"processes is {processes}: 1 or more is possible")
    if restarts < 0:
        raise UserError(f"restarts is {restarts}: 0 or more is possible")
    if restarts and processes == 1:
        raise UserError("restarts are those of several processes: give --processes too")
    if processes > 1 and launched().number > 1:
        raise UserError(
            "this is one of several processes already: leave out --processes, torchrun has a flag for it"
        )


def start(command: str, argv: Sequence[str], processes: int, restarts: int = 0) -> int:
    """Run ``clicktrain COMMAND ARGV`` in several processes; the exit code is that of the first that failed.

    Args:
        command: name of the command.
        argv: its arguments, without those of `LAUNCHER`.
        processes: on this machine.
        restarts: after a process has died.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the process itself says it
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "clicktrain", command, *argv)
    except ChildFailedError as failed:
        code = int(failed.get_first_failure()[1].exitcode)
        return code if code > 0 else 128 - code
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def without(argv: Sequence[str]) -> list[str]:
    """The arguments without those of `LAUNCHER`."""
    left: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, _ = word.partition("=")
        if flag in {option.flag for option in LAUNCHER}:
            if not equals:
                next(words, None)
            continue
        left.append(word)
    return left
