"""Which parts of a plan are to blame where the whole does not do what it says."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

MOST_TRIALS = 200
"""After this many, the rest is blamed without a look."""

T = TypeVar("T", bound=Hashable)
Check = Callable[[Sequence[T]], str | None]
"""What is wrong with some of the parts; None if nothing is."""


def blamed(parts: Sequence[T], wrong: Check[T]) -> dict[T, str]:
    """The parts that have to be left out so that the others are right, with the reasons.

    Halves are tried, so that one bad part among n takes about 2 log n trials.

    Args:
        parts: of a plan.
        wrong: tries some of them.
    """
    trials = 0

    def tried(some: Sequence[T]) -> str | None:
        nonlocal trials
        trials += 1
        return wrong(some)

    def search(some: Sequence[T], reason: str) -> dict[T, str]:
        if len(some) == 1 or trials > MOST_TRIALS:
            return dict.fromkeys(some, reason)
        half = len(some) // 2
        found: dict[T, str] = {}
        for side in (some[:half], some[half:]):
            if (own := tried(side)) is not None:
                found |= search(side, own)
        # Neither is wrong alone: one of them has to give way.
        return found or dict.fromkeys(some[half:], reason)

    bad: dict[T, str] = {}
    while (rest := [part for part in parts if part not in bad]) and (reason := tried(rest)) is not None:
        bad |= search(rest, reason)
    return bad
