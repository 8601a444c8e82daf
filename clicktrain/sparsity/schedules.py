"""Schedules: how sparse a network is to be at which time (Campfire Eq. (1), When to Prune? Algorithm 1).

A schedule says how much of the way is left, from 1 to 0, once a share of the time has passed: the sparsity is
``final - (final - initial) * left``, the share that RigL drops is ``first * left``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from clicktrain.errors import UserError
from clicktrain.sparsity.guard import guard_of, share_problem
from clicktrain.sparsity.registry import Registry

Schedule: TypeAlias = Callable[[float], float]


def linear(done: float) -> float:
    """At the same pace."""
    return 1 - done


def cubic(done: float) -> float:
    """Fast at first: Zhu and Gupta (2017), Eq. (1)."""
    return (1 - done) ** 3


def cosine(done: float) -> float:
    """Slow at both ends: RigL's ``f_decay``, half of ``1 + cos(pi t / T_end)``."""
    return (1 + math.cos(math.pi * done)) / 2


def constant(done: float) -> float:
    """All of it until the end."""
    return float(done < 1)


def _try(schedule: Schedule, layers: Sequence[Any]) -> None:
    del layers
    first, last = schedule(0.0), schedule(0.99)
    if first < last:
        raise UserError(f"it rises from {first:g} to {last:g}, but says what is left, from 1 down to 0")


SCHEDULES: Registry[Schedule] = Registry(
    "schedule",
    {"linear": linear, "cubic": cubic, "cosine": cosine, "constant": constant},
    guard=guard_of(
        "schedule",
        "a function (share of the time that has passed) -> how much is left, a number from 1 down to 0",
        lambda value, done: share_problem(value),
    ),
    trial=_try,
)
ScheduleChoice: TypeAlias = Annotated[str | Schedule, SCHEDULES]


def left_at(schedule: str | Schedule, done: float) -> float:
    """What a schedule leaves at a share of the time; nothing at the end, whatever the schedule says."""
    return 0.0 if done >= 1 else SCHEDULES.resolve(schedule)(done)


@dataclass(frozen=True, slots=True)
class Era:
    """The pruning era: the epochs between the first and the final epoch of pruning (Campfire section 2).

    Epochs count from 0 and may be fractions; the paper's "era 30-50" is ``Era(30, 50)``. The threshold
    begins to rise when ``first_epoch`` begins and has its final value when ``last_epoch`` begins; from then
    on masks are fixed. An era without any length prunes all at once.
    """

    first_epoch: float
    last_epoch: float

    def __post_init__(self) -> None:
        if not 0 <= self.first_epoch <= self.last_epoch:
            raise ValueError(
                "an era begins at epoch 0 or later and not after its end: "
                f"{self.first_epoch}-{self.last_epoch}"
            )

    @property
    def length(self) -> float:
        """Epochs of the era, l_p in Eq. (1)."""
        return self.last_epoch - self.first_epoch

    @classmethod
    def of_run(cls, epochs: int, first: float = 0.3, last: float = 0.5) -> Era:
        """These shares of a run, in whole epochs where the era then has at least one.

        The shares are those of the paper's era 30-50 in runs of 100 epochs.
        """
        begin, end = round(first * epochs), round(last * epochs)
        return cls(begin, end) if end > begin or first == last else cls(first * epochs, last * epochs)


def campfire_threshold(
    epoch: float,
    era: Era,
    final: float,
    initial: float = 0.0,
    exponent: float = 3.0,
    schedule: Schedule = linear,
) -> float:
    """Share of the weights that is to be zero in an epoch: Campfire Eq. (1).

    ``s_f - (s_f - s_i) * (1 - (e_c - e_i) / l_p)^r``. The paper prints ``s_i + s_f``, which would begin at
    ``-s_i``; with ``s_i = 0``, "always 0 in our case", both signs agree.

    Args:
        epoch: current epoch e_c, from 0.
        era: first epoch e_i and length l_p.
        final: s_f, in [0, 1].
        initial: s_i, in [0, 1].
        exponent: r > 0, 3 in the paper; larger rises sooner.
        schedule: what the exponent is of; linear in the paper.

    Returns:
        0 before the era, exactly ``initial`` at its first and exactly ``final`` from its last epoch on.

    Examples:
        >>> [round(campfire_threshold(e, Era(30, 50), 0.6), 3) for e in (29, 30, 40, 50, 90)]
        [0.0, 0.0, 0.525, 0.6, 0.6]
    """
    if epoch < era.first_epoch:
        return 0.0
    if epoch >= era.last_epoch:
        return final
    if epoch == era.first_epoch:
        return initial
    left = schedule((epoch - era.first_epoch) / era.length)
    return final - (final - initial) * math.pow(left, exponent)


def exponential_steps(total: float, final: float, steps: int) -> list[float]:
    """What is left after each of some pruning steps, ever smaller steps down: When to Prune?, Algorithm 1.

    ``exp(a * log(final) + (1 - a) * log(total))`` with ``a = step / steps``, the exponential scheduler of its
    reference [8] (FORCE): every step keeps the same share of what is left.

    Args:
        total: what there is before the first step (neurons, or milliseconds), above 0.
        final: what is left after the last one, above 0 and at most ``total``.
        steps: S, at least 1.

    Returns:
        S values that do not rise, the last exactly ``final``.

    Examples:
        >>> [round(left, 3) for left in exponential_steps(64, 8, 3)]
        [32.0, 16.0, 8]
    """
    if not 0 < final <= total or steps < 1:
        raise ValueError(f"no exponential schedule from {total} to {final} in {steps} steps")
    shares = (step / steps for step in range(1, steps))
    between = (math.exp(a * math.log(final) + (1 - a) * math.log(total)) for a in shares)
    return [*(min(max(left, final), total) for left in between), final]
