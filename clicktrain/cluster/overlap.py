"""An iteration in which gradients are exchanged while the backward pass still computes others."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""Bytes of DistributedDataParallel's first bucket of gradients, and of the others."""
BACKWARD = 2 / 3
"""Share of the backward pass in a step: of three passes of equal cost two are backward."""

Profile = Sequence[tuple[float, float]]
"""Layers in the order of the backward pass: (bytes of gradients, cost of its backward pass)."""


@dataclass(frozen=True)
class Message:
    """Gradients that are exchanged at once, when ``ready``, a share of the backward pass, is done."""

    num_bytes: float
    ready: float


@dataclass(frozen=True)
class Iteration:
    """A training step on many GPUs, in seconds.

    Attributes:
        exchange: all messages one after the other.
        exposed: what of it the step waits for, after the backward pass.
        seconds: the step.
    """

    exchange: float
    exposed: float
    seconds: float


def split_into_buckets(num_bytes: float, profile: Profile = ()) -> list[Message]:
    """Split gradients as DistributedDataParallel does: a small first bucket, then full ones.

    Without a profile gradients are taken to come about evenly over the backward pass.
    """
    messages: list[Message] = []
    done = 0.0
    while done < num_bytes:
        size = min(BUCKET if messages else FIRST_BUCKET, num_bytes - done)
        done += size
        messages.append(Message(size, ready_share(done / num_bytes, profile)))
    return messages


def equal_messages(num_bytes: float, count: int, profile: Profile = ()) -> list[Message]:
    """``count`` messages of equal size."""
    if not num_bytes:
        return []
    shares = [(number + 1) / count for number in range(count)]
    return [Message(num_bytes / count, ready_share(share, profile)) for share in shares]


def ready_share(share: float, profile: Profile) -> float:
    """Share of the backward pass after which this share of the gradients, from the last layer on, is there.

    A layer's gradients are there when its backward pass is done, whatever part of them is asked for.
    """
    total_bytes, total_cost = (sum(pair[of] for pair in profile) for of in (0, 1))
    if not total_bytes or not total_cost:
        return share
    so_far, ends, costs, cost = 0.0, [], [], 0.0
    for size, work in profile:
        so_far, cost = so_far + size, cost + work
        ends.append(so_far / total_bytes)
        costs.append(cost / total_cost)
    return costs[min(bisect.bisect_left(ends, share - 1e-12), len(costs) - 1)]


def iterate(
    messages: Sequence[Message], compute: float, seconds_of: Callable[[float], float], accumulated: int = 1
) -> Iteration:
    """Follow a training step: messages leave in their order, when they are ready and the links are free.

    Args:
        compute: seconds of the step on one GPU alone, of which `BACKWARD` is the backward pass.
        seconds_of: seconds to sum a message, from its bytes.
        accumulated: batches of the step, one after the other; gradients are exchanged in the last one.
    """
    backward, exchange, free = BACKWARD * compute / accumulated, 0.0, 0.0
    for message in messages:
        taken = seconds_of(message.num_bytes)
        exchange += taken
        free = max(free, message.ready * backward) + taken
    exposed = max(free - backward, 0.0)
    return Iteration(exchange, exposed, compute + exposed)
