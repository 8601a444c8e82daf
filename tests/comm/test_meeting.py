"""Processes find each other in a store that others have used before, and say who is missing."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from clicktrain.comm.meeting import Launch, connect, meet, numbered
from clicktrain.errors import FailedElsewhere, UserError

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")


def all_meet(store: Any, ranks: list[int], number: int, timeout_s: float = 20.0) -> list[Any]:
    """What each of these ranks hears, in threads: a name, or an error."""

    def one(rank: int) -> Any:
        try:
            return meet(store, rank, number, timeout_s)
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_all_get_one_name_and_no_other_meeting_has_it() -> None:
    store = dist.HashStore()
    names = [set(all_meet(store, list(range(number)), number)) for number in (3, 3, 2, 4)]
    assert all(len(one) == 1 for one in names)
    assert len(set.union(*names)) == 4


def test_words_of_ended_processes_are_not_taken_for_others() -> None:
    store = dist.HashStore()
    store.set("clicktrain/hello/1", "left by one that was killed")
    store.set("clicktrain/here/an earlier meeting/2", "")
    hears: list[Any] = []
    first = threading.Thread(target=lambda: hears.append(all_meet(store, [0], 3)[0]))
    first.start()
    first.join(0.3)
    assert first.is_alive(), "the first process has taken an old word for the process"
    others = all_meet(store, [1, 2], 3)
    first.join(20)
    assert {*hears, *others} == {hears[0]}


@pytest.mark.parametrize(("there", "message"), [
    ([0], "processes 1 and 2 of 3 did not come within 0.3 seconds: start as many as there are said to be"),
    ([0, 1], "process 2 of 3 did not come within 0.3 seconds"),
    ([1, 2], "process 0 of 3 did not come within 0.3 seconds: is it started?"),
])  # fmt: skip
def test_those_who_do_not_come_are_named_once(there: list[int], message: str) -> None:
    errors = all_meet(dist.HashStore(), there, 3, 0.3)
    said = [error for error in errors if not isinstance(error, FailedElsewhere)]
    assert len(said) == 1
    assert message in str(said[0])


def test_ranks_in_words() -> None:
    assert [numbered(ranks) for ranks in ([2], [0, 3], [1, 2, 5])] == [
        "process 2", "processes 0 and 3", "processes 1, 2 and 5",
    ]  # fmt: skip


def test_a_launch_keeps_what_processes_leave(tmp_path: Path) -> None:
    store = dist.HashStore()
    before, after, other = Launch(store), Launch(store), Launch()
    assert not after.has_begun(tmp_path)
    before.begins(tmp_path)
    assert after.has_begun(tmp_path)
    assert not after.has_begun(tmp_path / "another")
    assert not other.has_begun(tmp_path)
    assert after.hopeless is None
    before.gives_up("it cannot be")
    assert after.hopeless == "it cannot be"
    assert other.hopeless is None


def test_a_place_that_nobody_answers_at_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT are 'localhost' and '' in the environm"):
        connect(1, 2, 0.2)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UserError, match="process 1 of 2 cannot reach the first process at localhost:1"):
        connect(1, 2, 0.2)
