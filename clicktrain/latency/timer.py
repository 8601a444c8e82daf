"""Interleaved timing: calls that are compared take turns, so that a disturbance hits all of them alike."""

from __future__ import annotations

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import TypeAlias, TypeVar

import torch

from clicktrain.errors import UserError

Key = TypeVar("Key", bound=Hashable)
Calls: TypeAlias = Mapping[Key, Callable[[], object]]
"""What is timed, by name."""
Clock: TypeAlias = Callable[[], float]
"""Returns seconds."""
HOPELESS = 5
HOPELESS_MS = 100.0
"""See `timed_for`; a first call also builds things, which takes less than this."""


def clock_of(device: torch.device) -> Clock:
    """The clock that latencies on a device are measured with.

    Where one CPU thread does the work it is that thread's CPU time, so that other programs do not count;
    elsewhere it is the wall clock.
    """
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def synchronized(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A call that returns when the device has done its work."""
    if device.type != "cuda":
        return call

    def wait() -> None:
        call()
        torch.cuda.synchronize(device)

    return wait


def check_rounds(rounds: int) -> None:
    """Raise UserError unless there is at least one round to measure."""
    if rounds < 1:
        raise UserError(f"rounds must be at least 1, not {rounds}")


def median_ms(
    calls: Calls[Key], rounds: int, *, repeat: int = 1, warmup: int = 1, clock: Clock | None = None
) -> dict[Key, float]:
    """Median milliseconds of each call; arguments as `interleaved_ms`."""
    times = interleaved_ms(calls, rounds, repeat=repeat, warmup=warmup, clock=clock)
    return {key: statistics.median(ms) for key, ms in times.items()}


def candidates_ms(
    calls: Calls[Key],
    seconds: float,
    rounds: tuple[int, int] = (2, 7),
    rivals: Mapping[Key, Hashable] | None = None,
    device: torch.device | None = None,
) -> dict[Key, float]:
    """Median milliseconds of calls among which one is chosen, by default on the CPU; see `timed_for`."""
    device = device or torch.device("cpu")
    waiting = {key: synchronized(call, device) for key, call in calls.items()}
    times = timed_for(waiting, seconds, rounds, rivals=rivals, clock=clock_of(device))
    return {key: statistics.median(ms) for key, ms in times.items()}


def interleaved_ms(
    calls: Calls[Key], rounds: int, *, repeat: int = 1, warmup: int = 1, clock: Clock | None = None
) -> dict[Key, list[float]]:
    """Milliseconds of each call in each round.

    Every round times all calls, in another order each time, so that none always finds the caches as the same
    neighbor left them.

    Args:
        repeat: calls within one timing; more than one where a call takes microseconds.
    """
    check_rounds(rounds)
    with _turns(repeat, clock) as turn:
        for _ in range(warmup):
            turn(calls)
        all_rounds = [turn(calls) for _ in range(rounds)]
    return {key: [ms[key] for ms in all_rounds] for key in calls}


def timed_for(
    calls: Calls[Key],
    seconds: float,
    rounds: tuple[int, int],
    *,
    repeat: int = 1,
    rivals: Mapping[Key, Hashable] | None = None,
    clock: Clock | None = None,
) -> dict[Key, list[float]]:
    """`interleaved_ms` for about ``seconds``, after one round of warm-up.

    Args:
        seconds: for all rounds together, by ``clock``.
        repeat: calls within one timing; more than one where a call takes microseconds.
        rivals: by name, what a call is an alternative for. One whose warm-up takes more than `HOPELESS` times
            the fastest warm-up of its rivals, and more than `HOPELESS_MS`, is not called again, and its
            warm-up counts: bfloat16 on a processor without it takes seconds where float32 takes a tenth.
    """
    now = clock or time.perf_counter
    least, most = rounds
    with _turns(repeat, clock) as turn:
        first = turn(calls)
        hopeless = _hopeless(first, rivals or {})
        running = {key: call for key, call in calls.items() if key not in hopeless}
        times = {key: [first[key]] if key in hopeless else [] for key in calls}
        begin = now()
        for number in range(most):
            if number >= least and now() - begin > seconds:
                break
            for key, ms in turn(running).items():
                times[key].append(ms)
    return times


def _hopeless(first: Mapping[Key, float], rivals: Mapping[Key, Hashable]) -> set[Key]:
    fastest: dict[Hashable, float] = {}
    for key, rival in rivals.items():
        fastest[rival] = min(fastest.get(rival, first[key]), first[key])
    return {key for key, rival in rivals.items() if first[key] > max(HOPELESS * fastest[rival], HOPELESS_MS)}


@contextlib.contextmanager
def _turns(repeat: int, clock: Clock | None) -> Iterator[Callable[[Calls[Key]], dict[Key, float]]]:
    """A function that times every call once, in another order each time; no garbage collection meanwhile."""
    now = clock or time.perf_counter
    shuffle = random.Random(0).shuffle

    def turn(calls: Calls[Key]) -> dict[Key, float]:
        order, ms = list(calls), {}
        shuffle(order)
        for key in order:
            call = calls[key]
            start = now()
            for _ in range(repeat):
                call()
            ms[key] = (now() - start) / repeat * 1e3
        return ms

    collecting = gc.isenabled()
    gc.collect(1)  # not the oldest: in a process with torch that takes a quarter of a second each time
    gc.disable()  # a collection would fall into the time of whichever call it happens in
    try:
        yield turn
    finally:
        if collecting:
            gc.enable()
