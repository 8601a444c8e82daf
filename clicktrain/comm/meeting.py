"""How the processes of one training find each other, again and again in one launch.

The launcher's store outlives the processes that it starts: after a failure, or when machines come and go, new
ones find the keys of earlier ones in it. The number of restarts does not distinguish them, since launchers
count failures only.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import torch.distributed as dist

from clicktrain.errors import FailedElsewhere, UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, TCPStore

_POLL_S = 0.02
_BEGUN, _HOPELESS = "clicktrain/begun", "clicktrain/hopeless"


def connect(rank: int, number: int, timeout_s: float) -> TCPStore:
    """The store that the launcher keeps, or that the first process opens where the launcher has none.

    Raises:
        UserError: the launcher has not said where it is, or nobody answers there.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        raise UserError(
            f"MASTER_ADDR and MASTER_PORT are {host!r} and {port!r} in the environment, where processes of "
            "one training meet: start them with torchrun"
        )
    mine = rank == 0 and not has_store()
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            host, int(port), is_master=mine, timeout=timedelta(seconds=timeout_s), wait_for_workers=False,
            multi_tenant=True,
        )  # fmt: skip
    except RuntimeError as error:
        reason = str(error).split("\n", 1)[0]
        whose = "the launcher" if has_store() else "the first process"
        raise UserError(
            f"process {rank} of {number} cannot reach {whose} at {host}:{port} within {timeout_s:g} seconds: "
            f"{reason}"
        ) from None


def has_store() -> bool:
    """Whether the launcher keeps a store, which then outlives processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meet(store: Store, rank: int, number: int, timeout_s: float) -> str:
    """Wait until all processes are there; a name for this meeting that none before it has had.

    The first process welcomes each one by a word that only this one knows, and waits for its answer; words
    that ended processes have left are welcomed in vain.

    Raises:
        UserError: processes did not come in time: names them. `FailedElsewhere` where another says so.
    """
    until = time.monotonic() + timeout_s
    word = uuid4().hex
    if rank == 0:
        _welcome(store, word, number, until, timeout_s)
        return word
    store.set(f"clicktrain/hello/{rank}", word)
    name = _wait(store, f"clicktrain/welcome/{word}", until)
    if name is None:
        if store.add("clicktrain/speaks", 1) > 1:
            raise FailedElsewhere("the first process did not come")
        raise UserError(f"process 0 of {number} did not come within {timeout_s:g} seconds: is it started?")
    store.set(f"clicktrain/here/{name}/{rank}", "")
    # The first process says who is missing.
    if _wait(store, f"clicktrain/all/{name}", until + timeout_s) != "all":
        raise FailedElsewhere("processes did not come")
    return name


def _welcome(store: Store, name: str, number: int, until: float, timeout_s: float) -> None:
    missing, welcomed = set(range(1, number)), dict[int, str]()
    while True:
        for other in sorted(missing):
            if store.check([f"clicktrain/here/{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"clicktrain/hello/{other}"]):
                word = store.get(f"clicktrain/hello/{other}").decode()
                if welcomed.get(other) != word:
                    store.set(f"clicktrain/welcome/{word}", name)
                    welcomed[other] = word
        if not missing:
            store.set(f"clicktrain/all/{name}", "all")
            return
        if time.monotonic() > until:
            store.set(f"clicktrain/all/{name}", "not all")
            raise UserError(
                f"{numbered(sorted(missing))} of {number} did not come within {timeout_s:g} seconds: "
                "start as many as there are said to be"
            )
        time.sleep(_POLL_S)


def _wait(store: Store, key: str, until: float) -> str | None:
    while not store.check([key]):
        if time.monotonic() > until:
            return None
        time.sleep(_POLL_S)
    return store.get(key).decode()


def numbered(ranks: list[int]) -> str:
    """``process 2``, or ``processes 0, 2 and 5``."""
    if len(ranks) == 1:
        return f"process {ranks[0]}"
    return f"processes {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


class Launch:
    """What processes leave for those that the same launcher starts after them; nothing without a store."""

    def __init__(self, store: Store | None = None) -> None:
        self._store = store

    def begins(self, folder: Path) -> None:
        """A run has begun in this folder."""
        if self._store is not None:
            self._store.set(_BEGUN, str(folder.absolute()))

    def has_begun(self, folder: Path) -> bool:
        """Whether this launch has begun the run in this folder."""
        if self._store is None or not self._store.check([_BEGUN]):
            return False
        return self._store.get(_BEGUN).decode() == str(folder.absolute())

    def gives_up(self, sentence: str) -> None:
        """Starting again would not help."""
        if self._store is not None:
            self._store.set(_HOPELESS, sentence)

    @property
    def hopeless(self) -> str | None:
        """What was said when processes gave up, if they did."""
        if self._store is None or not self._store.check([_HOPELESS]):
            return None
        return self._store.get(_HOPELESS).decode()
