"""Which process is missing, where the others wait for it.

A process that waits in a collective knows only that somebody has not come. So each says a few times a second,
in the store in which they met, that it is alive, how many collectives it has entered, and where it is. Who is
behind, or is not heard from, is missing.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import torch.distributed as dist

from clicktrain.comm.meeting import numbered
from clicktrain.errors import FailedElsewhere, ProcessLost, UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_BEAT_S = 0.5
_SLOWER_S = 1 / 512
"""Added for every process, so that one store serves a thousand."""
_SETTLE_S = 3.0
"""What others say last is waited for."""


@dataclass(frozen=True)
class Beat:
    """What a process has said last.

    Attributes:
        number: of the beats so far.
        entered: collectives entered, for each group of processes by its name.
        place: where its main thread is.
    """

    number: int
    entered: Mapping[str, int]
    place: str

    def encode(self) -> str:
        """As text."""
        groups = ",".join(f"{name}={count}" for name, count in self.entered.items())
        return f"{self.number}|{groups}|{self.place}"

    @classmethod
    def decode(cls, text: str) -> Beat:
        """Inverse of `encode`."""
        number, groups, place = text.split("|", 2)
        pairs = (one.split("=") for one in groups.split(",") if one)
        return cls(int(number), {name: int(count) for name, count in pairs}, place)


class Watch:
    """Says that this process is alive, and finds out which others are not, or are behind."""

    def __init__(self, store: Store, rank: int, number: int, timeout_s: float) -> None:
        """Use a part of the store that no other processes have used, by a connection of its own."""
        self._store, self.rank, self.number, self._timeout_s = store, rank, number, timeout_s
        self._groups: dict[str, tuple[dist.ProcessGroup, frozenset[int]]] = {}
        self._beats = 0
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._say_alive, name="clicktrain watch", daemon=True)

    def follow(self, name: str, group: dist.ProcessGroup, ranks: frozenset[int] | None = None) -> None:
        """Count the collectives of a group, which is known to its members by this name."""
        everyone = frozenset(range(self.number))
        self._groups = {**self._groups, name: (group, everyone if ranks is None else ranks)}

    def start(self) -> None:
        """Say so from now on, from a thread."""
        self._thread.start()

    def end(self) -> None:
        """This process leaves as it should, or has said why."""
        self._ended.set()
        self._thread.join(timeout=_SETTLE_S)
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "")

    def failed(self, sentence: str) -> None:
        """This process ends with these words: the others need not say anything."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"failed/{self.rank}", sentence)

    # ---- being alive ------------------------------------------------------------------------

    def _say_alive(self) -> None:
        while True:
            try:
                self._beat()
            except RuntimeError:
                return  # the store is gone, and with it those who would read
            if self._ended.wait(_BEAT_S + self.number * _SLOWER_S):
                return

    def _beat(self) -> None:
        self._beats += 1
        beat = Beat(self._beats, self._entered(), _place(sys._current_frames().get(self._main)))
        self._store.set(f"beat/{self.rank}", beat.encode())

    def _entered(self) -> dict[str, int]:
        counts = {}
        for name, (group, _) in self._groups.items():
            with contextlib.suppress(RuntimeError):
                counts[name] = int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]
        return counts

    # ---- finding out ------------------------------------------------------------------------

    def explained(self, error: RuntimeError) -> UserError:
        """Why a collective failed: the one process that says it gets `ProcessLost`, others stay silent.

        Waits a few seconds for what the others have to say.
        """
        try:
            with _undisturbed():  # launchers end the others as soon as they see that one has failed
                said, dead, behind = self._missing()
            if said or self._store.add("speaks", 1) > 1:
                return FailedElsewhere("another process says why")
        except RuntimeError:  # the store has ended with the process that kept it
            said, dead, behind = False, {0} - {self.rank}, {}
        return ProcessLost(f"{self._sentence(dead, behind, error)}; the last checkpoint is kept")

    def _missing(self) -> tuple[bool, set[int], dict[int, Beat]]:
        """Whether another process says why it fails; who is not heard from any more; who is behind."""
        self._store.set(f"lost/{self.rank}", "")
        others = set(range(self.number)) - {self.rank}
        before = dict(self._beats_of(others))
        until = time.monotonic() + _SETTLE_S + self.number * _SLOWER_S
        while time.monotonic() < until:
            if any(self._store.check([f"failed/{other}"]) for other in others):
                return True, set(), {}
            time.sleep(_BEAT_S / 2)
        now = dict(self._beats_of(others))
        silent = {other for other in others if now.get(other) == before.get(other)}
        dead = {other for other in silent if not self._has_left(other)}
        own = self._entered()
        behind = {
            other: beat
            for other, beat in now.items()
            if other not in dead and not self._has_left(other) and self._is_behind(other, beat, own)
        }
        return False, dead, behind

    def _beats_of(self, ranks: set[int]) -> Iterator[tuple[int, Beat]]:
        for rank in sorted(ranks):
            if self._store.check([f"beat/{rank}"]):
                yield rank, Beat.decode(self._store.get(f"beat/{rank}").decode())

    def _has_left(self, rank: int) -> bool:
        return any(self._store.check([f"{what}/{rank}"]) for what in ("left", "lost"))

    def _is_behind(self, rank: int, beat: Beat, own: Mapping[str, int]) -> bool:
        shared = {name for name, (_, ranks) in self._groups.items() if rank in ranks}
        return any(beat.entered.get(name, 0) < own.get(name, 0) for name in shared)

    def _sentence(self, dead: set[int], behind: Mapping[int, Beat], error: RuntimeError) -> str:
        if dead:
            has = "has" if len(dead) == 1 else "have"
            return (
                f"{numbered(sorted(dead))} of {self.number} {has} died without a word (killed, or out of "
                "memory?), or been stopped or cut off"
            )
        if behind:
            places = "; ".join(f"process {rank} is at {beat.place}" for rank, beat in sorted(behind.items()))
            has = "has" if len(behind) == 1 else "have"
            return (
                f"{numbered(sorted(behind))} of {self.number} {has} not arrived within {self._timeout_s:g} "
                f"seconds (--process-timeout): {places}"
            )
        reason = str(error).split("\n", 1)[0]
        return f"process {self.rank} of {self.number} waits in vain for the others: {reason}"


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Ignore SIGTERM in the block, if this thread may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _place(frame: FrameType | None) -> str:
    """The line that a thread is at, in the code of whoever is not PyTorch's."""
    while frame is not None and frame.f_back is not None and _is_torch(frame):
        frame = frame.f_back
    if frame is None:
        return "its end"
    code = frame.f_code
    name = "/".join(Path(code.co_filename).parts[-2:])
    return f"{name}, line {frame.f_lineno}, in {code.co_name}"


def _is_torch(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "torch"
