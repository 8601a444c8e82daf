"""An iteration against one that is followed tick by tick."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clicktrain.cluster.overlap import (
    BUCKET,
    FIRST_BUCKET,
    Message,
    equal_messages,
    iterate,
    ready_share,
    split_into_buckets,
)


def ticked(ready: list[int], lengths: list[int], backward: int) -> int:
    """The tick at which the last message has arrived, or the backward pass ends if that is later."""
    tick, waiting, busy = 0, list(zip(ready, lengths, strict=True)), 0
    while tick < backward or waiting or busy:
        if not busy and waiting and waiting[0][0] <= tick:
            busy = waiting.pop(0)[1]
        tick += 1
        busy = max(busy - 1, 0)
    return tick


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), max_size=6),
    st.integers(30, 60),
    st.integers(1, 3),
)
def test_messages_wait_for_gradients_and_for_the_links(
    pairs: list[tuple[int, int]], backward: int, accumulated: int
) -> None:
    ready = sorted(at for at, _ in pairs)
    lengths = [length for _, length in pairs]
    messages = [Message(length, at / backward) for at, length in zip(ready, lengths, strict=True)]
    compute = accumulated * backward * 1.5  # two thirds of each batch are the backward pass
    step = iterate(messages, compute, lambda num_bytes: num_bytes, accumulated)
    end = ticked(ready, lengths, backward)
    assert step.exposed == pytest.approx(end - backward, abs=1e-9)
    assert step.seconds == pytest.approx(compute + end - backward)
    assert step.exchange == sum(lengths)


def test_buckets_are_those_of_distributed_data_parallel() -> None:
    messages = split_into_buckets(60 * 2**20)
    assert [message.num_bytes for message in messages] == [FIRST_BUCKET, BUCKET, BUCKET, 9 * 2**20]
    assert [message.ready for message in messages] == pytest.approx([1 / 60, 26 / 60, 51 / 60, 1])
    assert split_into_buckets(0) == []
    assert [message.num_bytes for message in split_into_buckets(1000)] == [1000]


def test_a_layer_is_ready_as_a_whole() -> None:
    profile = [(80.0, 1.0), (10.0, 4.0), (10.0, 5.0)]  # the last layer has most bytes and little to compute
    shares = (0.1, 0.8, 0.81, 0.9, 1.0)
    assert [ready_share(share, profile) for share in shares] == pytest.approx([0.1, 0.1, 0.5, 0.5, 1])
    assert [message.ready for message in equal_messages(100, 2, profile)] == pytest.approx([0.1, 1])
    assert equal_messages(0, 2) == []


def test_what_is_small_enough_is_hidden() -> None:
    messages = split_into_buckets(100 * 2**20)
    hidden = iterate(messages, 3.0, lambda num_bytes: 0.01 * num_bytes / 2**20)
    assert hidden.exchange == pytest.approx(1.0)
    assert hidden.exposed == pytest.approx(0.24)  # the last bucket of 24 MiB
    exposed = iterate(messages, 3.0, lambda num_bytes: num_bytes / 2**20)
    assert exposed.exposed == pytest.approx(100 + 2 / 100 - 2)
