"""The processes of one training: who they are, and how they begin and end together.

PyTorch's own launcher starts them (``torchrun``); what it says is read from the environment. Without it there
is one process, and nothing is sent.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from clicktrain.errors import ProcessLost, UserError

TIMEOUT_S = 1800.0
"""Seconds that processes wait for each other: choosing and compiling operators takes one of them minutes."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: from 0; the process of rank 0 writes the run's folder and speaks.
        number: of processes.
        local_rank: rank among those on this machine.
        local_number: processes on this machine.
        restarts: how often the launcher has started all of them again.
    """

    rank: int = 0
    number: int = 1
    local_rank: int = 0
    local_number: int = 1
    restarts: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    @property
    def threads(self) -> int | None:
        """Threads of this process, so that those on one machine share its cores; None: as PyTorch likes."""
        return max((os.cpu_count() or 1) // self.local_number, 1) if self.local_number > 1 else None


ALONE = Processes()
"""There is one process."""


def launched() -> Processes:
    """What the launcher says of this process; one process without a launcher, or with nobody else.

    Raises:
        UserError: the launcher's variables are incomplete or no numbers.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return ALONE
    names = {"rank": "RANK", "number": "WORLD_SIZE", "local_rank": "LOCAL_RANK",
             "local_number": "LOCAL_WORLD_SIZE"}  # fmt: skip
    texts = {field: os.environ.get(name, "") for field, name in names.items()}
    wrong = next((names[field] for field, text in texts.items() if not text.isdigit()), None)
    if wrong is not None:
        raise UserError(
            f"{wrong} is {os.environ.get(wrong)!r} in the environment, where RANK and WORLD_SIZE say that "
            "this is one of several processes: start them with torchrun, or unset these two"
        )
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Processes(
        **{field: int(text) for field, text in texts.items()},
        restarts=int(restarts) if restarts.isdigit() else 0,
    )


@contextlib.contextmanager
def together(timeout_s: float = TIMEOUT_S) -> Iterator[Processes]:
    """Join the other processes that the launcher has started, and leave them at the end of the block.

    A group that the caller has made already is used as it is. GPUs talk by NCCL, one each, CPUs by gloo.

    Raises:
        UserError: the launcher's variables are wrong, or the others cannot be reached.
    """
    processes = launched()
    if dist.is_available() and dist.is_initialized():
        yield replace(processes, rank=dist.get_rank(), number=dist.get_world_size())
        return
    if processes.number == 1:
        yield processes
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(processes.local_rank % torch.cuda.device_count())
    try:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        timeout = timedelta(seconds=timeout_s)
        store, rank, number = next(rendezvous("env://", timeout=timeout))
        # The launcher's store outlives its processes: new ones would find the addresses of dead ones in it.
        own = dist.distributed_c10d.PrefixStore(f"clicktrain/{processes.restarts}", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=number, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        who = f"process {processes.rank} of {processes.number}"
        raise UserError(f"{who} cannot reach the others: {error}") from None
    try:
        yield processes
    except RuntimeError as error:
        if not _is_of_others(error):
            raise
        minutes = timeout_s / 60
        raise ProcessLost(
            f"process {processes.rank} of {processes.number} waits in vain for the others: one of them has "
            f"ended, or has not answered for {minutes:g} minutes; the last checkpoint is kept"
        ) from error
    finally:
        dist.destroy_process_group()


def group_among(groups: Iterable[Sequence[int]]) -> dist.ProcessGroup | None:
    """The group of ranks that this process is in; every process makes all of them, in the same order."""
    own = None
    for ranks in groups:
        made = dist.new_group(list(ranks))
        own = made if dist.get_rank() in ranks else own
    return own


def _is_of_others(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
