"""The processes of one training: who they are, and how they begin and end together.

PyTorch's own launcher starts them (``torchrun``); what it says is read from the environment. Without it there
is one process, and nothing is sent.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist

from clicktrain.comm.agreement import patient_group
from clicktrain.comm.meeting import Launch, connect, has_store, meet
from clicktrain.comm.watch import Watch
from clicktrain.errors import FailedElsewhere, UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

TIMEOUT_S = 600.0
"""Seconds that processes wait for one that does not arrive."""
PATIENCE_S = 1800.0
"""Seconds that they wait for one that works for all: choosing and compiling operators takes it minutes."""


_ALONE_S = 10.0
"""Seconds in which one process alone has to reach its launcher, without which it gets along."""


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: from 0; the process of rank 0 writes the run's folder and speaks.
        number: of processes.
        local_rank: rank among those on this machine.
        local_number: processes on this machine.
        restarts: how often the launcher has started all of them again.
        launch: what processes before them have left, see `Launch`.
    """

    rank: int = 0
    number: int = 1
    local_rank: int = 0
    local_number: int = 1
    restarts: int = 0
    launch: Launch = field(default_factory=Launch, compare=False, repr=False)

    @property
    def may_restart(self) -> bool:
        """Whether the launcher starts processes again that have failed."""
        return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0")

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
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    restarts = int(count) if count.isdigit() else 0
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return replace(ALONE, restarts=restarts)
    names = {"rank": "RANK", "number": "WORLD_SIZE", "local_rank": "LOCAL_RANK",
             "local_number": "LOCAL_WORLD_SIZE"}  # fmt: skip
    texts = {what: os.environ.get(name, "") for what, name in names.items()}
    wrong = next((names[what] for what, text in texts.items() if not text.isdigit()), None)
    if wrong is not None:
        raise UserError(
            f"{wrong} is {os.environ.get(wrong)!r} in the environment, where RANK and WORLD_SIZE say that "
            "this is one of several processes: start them with torchrun, or unset these two"
        )
    numbers: dict[str, Any] = {what: int(text) for what, text in texts.items()}
    return Processes(**numbers, restarts=restarts)


@contextlib.contextmanager
def together(timeout_s: float = TIMEOUT_S) -> Iterator[Processes]:
    """Join the other processes that the launcher has started, and leave them at the end of the block.

    A group that the caller has made already is used as it is. GPUs talk by NCCL, one each, CPUs by gloo.

    Args:
        timeout_s: seconds that processes wait for one that does not arrive. Where one of them works for all,
            as it does when operators are measured, they wait for `PATIENCE_S` if that is longer.

    Raises:
        UserError: the launcher's variables are wrong, or processes do not come.
        ProcessLost: one of them has died, or hangs.
    """
    processes = launched()
    if dist.is_available() and dist.is_initialized():
        yield replace(processes, rank=dist.get_rank(), number=dist.get_world_size())
        return
    if processes.number == 1 and not has_store():
        yield processes
        return
    rank, number = processes.rank, processes.number
    try:
        store = connect(rank, number, timeout_s if number > 1 else _ALONE_S)
    except UserError:
        if number > 1:
            raise
        yield processes  # not the launcher's own process, but one that inherits its variables
        return
    processes = replace(processes, launch=Launch(store if has_store() else None))
    if processes.launch.hopeless is not None:
        raise FailedElsewhere(processes.launch.hopeless)
    with contextlib.ExitStack() as held:
        watch = None
        if number > 1:
            name = f"clicktrain/{meet(store, rank, number, timeout_s)}"
            own = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
            watch = Watch(own.clone() if hasattr(own, "clone") else own, rank, number, timeout_s)
            held.enter_context(_watched(watch))
        try:
            if watch is not None:
                held.enter_context(_joined(own, rank, number, timeout_s, watch))
            yield processes
        except FailedElsewhere:
            raise
        except Exception as error:
            lost = lost_by(error)
            if lost is not None:
                raise lost from error
            _note(error, watch)
            if isinstance(error, UserError) and not error.may_pass:
                processes.launch.gives_up(str(error))
            raise


def end(code: int) -> NoReturn:
    """End this process, which was one of several, without taking the interpreter apart.

    gloo's threads outlive every `DistributedDataParallel`, and may still hold what its hook has made. If they
    let go of it while the interpreter ends, the process aborts ("terminate called without an active
    exception", https://github.com/pytorch/pytorch/issues/190489): a launcher takes finished work for failed.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def _note(error: Exception, watch: Watch | None) -> None:
    if watch is not None:
        watch.failed(str(error) if isinstance(error, UserError) else type(error).__name__)


@contextlib.contextmanager
def _watched(watch: Watch) -> Iterator[None]:
    """Groups that are made in the block are watched too."""
    global _watch
    watch.start()
    _watch = watch
    try:
        yield
    finally:
        _watch = None
        watch.end()


@contextlib.contextmanager
def _joined(store: Store, rank: int, number: int, timeout_s: float, watch: Watch) -> Iterator[None]:
    if torch.cuda.is_available():
        torch.cuda.set_device(launched().local_rank % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=number, timeout=timeout)
    try:
        patient = dist.new_group(timeout=timedelta(seconds=max(timeout_s, PATIENCE_S)), backend="gloo")
        for name, group in (("all", dist.distributed_c10d._get_default_group()), ("patient", patient)):
            watch.follow(name, group)
        with patient_group(patient):
            yield
    finally:
        dist.destroy_process_group()


_watch: Watch | None = None


def lost_by(error: Exception) -> UserError | None:
    """Why a collective has failed, if this is what happened, in words: see `Watch.explained`."""
    if _watch is None or not isinstance(error, RuntimeError) or not _is_of_others(error):
        return None
    return _watch.explained(error)


def group_among(groups: Iterable[Sequence[int]]) -> dist.ProcessGroup | None:
    """The group of ranks that this process is in; every process makes all of them, in the same order."""
    own = None
    for ranks in groups:
        made = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            own = made
            if _watch is not None:
                _watch.follow(f"{ranks[0]}-{ranks[-1]}", made, frozenset(ranks))
    return own


def _is_of_others(error: RuntimeError) -> bool:
    """Whether a collective failed because of another process."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
