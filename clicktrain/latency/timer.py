"""Times of calls that are compared with each other: interleaved, and told as medians."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from clicktrain.errors import UserError

Key = TypeVar("Key")


def check_rounds(rounds: int) -> None:
    """Raise UserError unless there is at least one round to measure."""
    if rounds < 1:
        raise UserError(f"rounds must be at least 1, not {rounds}")


def median_ms(
    calls: Mapping[Key, Callable[[], object]],
    rounds: int,
    *,
    repeat: int = 1,
    warmup: int = 1,
    clock: Callable[[], float] | None = None,
) -> dict[Key, float]:
    """Median milliseconds of each call; arguments as `interleaved_ms`."""
    times = interleaved_ms(calls, rounds, repeat=repeat, warmup=warmup, clock=clock)
    return {key: statistics.median(found) for key, found in times.items()}


def least_ms(
    calls: Mapping[Key, Callable[[], object]], rounds: int, *, clock: Callable[[], float] | None = None
) -> dict[Key, float]:
    """Least milliseconds of each call; arguments as `interleaved_ms`.

    What the call takes when nothing disturbs it: on a busy machine a median tells of the other programs.
    """
    times = interleaved_ms(calls, rounds, clock=clock)
    return {key: min(found) for key, found in times.items()}


def timed_for(
    calls: Mapping[Key, Callable[[], object]],
    seconds: float,
    rounds: tuple[int, int],
    *,
    clock: Callable[[], float] | None = None,
) -> dict[Key, list[float]]:
    """`interleaved_ms` for about so many seconds, in at least and at most so many rounds."""
    once = sum(ms for (ms,) in interleaved_ms(calls, 1).values())
    least, most = rounds
    return interleaved_ms(calls, min(max(round(1000 * seconds / max(once, 1e-3)), least), most), clock=clock)


def interleaved_ms(
    calls: Mapping[Key, Callable[[], object]],
    rounds: int,
    *,
    repeat: int = 1,
    warmup: int = 1,
    clock: Callable[[], float] | None = None,
) -> dict[Key, list[float]]:
    """Milliseconds of each call in each round.

    Every round times all calls, so that whatever else the machine does meets all of them; in another order
    each time, so that none always finds the caches as the same neighbour left them.

    Args:
        calls: what to time, by name.
        rounds: how many times each is timed.
        repeat: calls within one timing; more than one where a call takes microseconds.
        warmup: rounds before those that count.
        clock: seconds; wall clock by default.
    """
    check_rounds(rounds)
    now = clock or time.perf_counter
    order = list(calls)
    times: dict[Key, list[float]] = {key: [] for key in order}
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.collect(1)  # not the oldest: in a process with torch that takes a quarter of a second each time
    gc.disable()  # a collection would fall into the time of whichever call it happens in
    try:
        for number in range(warmup + rounds):
            shuffle(order)
            for key in order:
                call = calls[key]
                start = now()
                for _ in range(repeat):
                    call()
                taken = now() - start
                if number >= warmup:
                    times[key].append(taken / repeat * 1e3)
    finally:
        if collecting:
            gc.enable()
    return times
