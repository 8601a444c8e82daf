"""Beats, and what follows from them about those who do not come."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

from clicktrain.comm import watch as module
from clicktrain.comm.watch import Beat, Watch
from clicktrain.errors import FailedElsewhere, ProcessLost

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
LOST = RuntimeError("gloo: Connection closed by peer\nmore")


class Group:
    """Counts the collectives that a process has entered, as a process group does."""

    def __init__(self, entered: int) -> None:
        self.entered = entered

    def _get_sequence_number_for_group(self) -> int:
        return self.entered


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEAT_S", 0.02)
    monkeypatch.setattr(module, "_SETTLE_S", 0.2)


def watches(store: Any, entered: list[int]) -> list[Watch]:
    made = [Watch(store, rank, len(entered), 7) for rank in range(len(entered))]
    for one, count in zip(made, entered, strict=True):
        one.follow("all", Group(count))  # type: ignore[arg-type]
        one.start()
    time.sleep(0.1)
    return made


def test_a_beat_comes_back() -> None:
    beat = Beat(3, {"all": 7, "0-1": 0}, "a.py, line 3, in f|g")
    assert Beat.decode(beat.encode()) == beat
    assert Beat.decode(Beat(1, {}, "").encode()) == Beat(1, {}, "")


def test_who_has_entered_fewer_collectives_is_behind_and_it_is_said_once() -> None:
    all_of_them = watches(dist.HashStore(), [5, 4, 5, 3])
    errors = [all_of_them[rank].explained(LOST) for rank in (2, 0)]
    assert isinstance(errors[0], ProcessLost)
    assert str(errors[0]).startswith(
        "processes 1 and 3 of 4 have not arrived within 7 seconds (--process-timeout): process 1 is at "
    )
    assert "; process 3 is at " in str(errors[0])
    assert str(errors[0]).endswith("; the last checkpoint is kept")
    assert isinstance(errors[1], FailedElsewhere)
    for one in all_of_them:
        one.end()


def test_who_is_not_heard_from_is_dead() -> None:
    all_of_them = watches(dist.HashStore(), [5, 5, 5])
    all_of_them[2]._ended.set()  # its thread ends as that of a killed process does
    all_of_them[2]._thread.join()
    assert str(all_of_them[1].explained(LOST)).startswith(
        "process 2 of 3 has died without a word (killed, or"
    )
    for one in all_of_them[:2]:
        one.end()


def test_who_leaves_or_says_why_is_not_dead() -> None:
    store = dist.HashStore()
    all_of_them = watches(store, [5, 5, 5])
    all_of_them[2].end()
    assert str(all_of_them[0].explained(LOST)) == (
        "process 0 of 3 waits in vain for the others: gloo: Connection closed by peer; the last checkpoint "
        "is kept"
    )
    all_of_them[1].failed("a mistake in the settings")
    assert isinstance(all_of_them[0].explained(LOST), FailedElsewhere)
    for one in all_of_them[:2]:
        one.end()


def test_groups_of_some_processes_count_for_these_alone() -> None:
    store = dist.HashStore()
    all_of_them = watches(store, [5, 5, 5])
    for rank, entered in ((0, 9), (1, 8)):
        all_of_them[rank].follow("0-1", Group(entered), frozenset((0, 1)))  # type: ignore[arg-type]
    time.sleep(0.1)
    assert str(all_of_them[0].explained(LOST)).startswith("process 1 of 3 has not arrived within 7 seconds")
    for one in all_of_them:
        one.end()
