"""A learning rate in two cycles, around the moment at which masks are frozen.

The settings' schedule is the first cycle and ends at a floor just before the cut; from there the rate
restarts and falls in a straight line to zero at the end of the run, as in budgeted training (Li et al. 2020)
and BIMP (Zimmer et al. 2023). The cut is where the method says that it will be; where that depends on
training, the first cycle is that of a run without a cut until it is known.

All steps here are optimizer steps of the first batch size (`BatchSizes.schedule_step`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clicktrain.errors import UserError
from clicktrain.train.config import RunConfig
from clicktrain.train.optim import learning_rate_factor, peak_step, warmup_steps

DAMAGE_BATCHES = 10
"""Batches whose loss is compared, before and after masks are frozen."""


@dataclass
class CycleState:
    """What is known of the cycles; steps, and factors on the peak learning rate.

    ``cut`` is the step at which masks are to be frozen, ``learned`` when that became known and ``level`` the
    factor then, ``restart`` the first step of the second cycle and ``height`` its factor. ``losses`` are
    those of the last batches before the cut, where they are asked for.
    """

    cut: float | None = None
    learned: float = 0.0
    level: float | None = None
    restart: float | None = None
    height: float = 0.0
    losses: list[float] = field(default_factory=list)


class SecondCycle:
    """The factor on the peak learning rate over a run with two cycles; a function of the step."""

    def __init__(self, config: RunConfig, total_steps: int, cut_epoch: float | None) -> None:
        """Plan the cycles.

        Args:
            config: with its schedule, ``second_cycle`` and ``cycle_floor``.
            total_steps: of the run.
            cut_epoch: epochs done when masks are to be frozen; None if that depends on training.

        Raises:
            UserError: the cut leaves nothing to the second cycle, or comes before the rate has risen.
        """
        self._config, self._total = config, total_steps
        self.state = CycleState()
        self._first = learning_rate_factor(config, total_steps)
        self._peak = 0.0
        if cut_epoch is not None:
            if cut_epoch >= config.epochs:
                raise UserError(
                    f"second_cycle is set but method {config.method} freezes its masks at the end of the "
                    "run: have it freeze them earlier, or leave second_cycle out"
                )
            self.state.cut = self._step_of(cut_epoch)
        self._plan()

    def _step_of(self, epoch: float) -> float:
        return epoch / self._config.epochs * self._total

    def _plan(self) -> None:
        """Squeeze the schedule into the steps before the cut, if that was known at the start."""
        config, state = self._config, self.state
        if state.cut is None or state.level is not None:
            return
        steps = max(round(state.cut), 1)
        warmup = warmup_steps(config, self._total)
        self._peak = peak_step(config, steps, warmup)
        if warmup and warmup >= steps:
            raise UserError(
                f"warmup_epochs is {config.warmup_epochs:g} but masks are frozen after "
                f"{self.planned_epoch:.3g} epochs, before which the learning rate has to "
                "fall: shorten it, or leave second_cycle out"
            )
        self._first = learning_rate_factor(config, steps, self._total)

    def __call__(self, step: float) -> float:
        """The factor at a step, as far as the cycles are known."""
        state, floor = self.state, self._config.cycle_floor
        if state.restart is not None and step >= state.restart:
            left = (self._total - step) / max(self._total - state.restart, 1e-9)
            return state.height * min(max(left, 0.0), 1.0)
        if state.cut is None:
            return self._first(step)
        if state.level is not None:
            low = min(floor, state.level)
            done = (step - state.learned) / max(state.cut - state.learned, 1e-9)
            return state.level + (low - state.level) * min(max(done, 0.0), 1.0)
        if step >= state.cut:
            return floor
        value = self._first(step)
        return value if step < self._peak else floor + (1 - floor) * value

    def share(self, step: float) -> float:
        """Share of the running cycle that is done: of the whole run while no cut is known."""
        state = self.state
        if state.restart is not None:
            done = (step - state.restart) / max(self._total - state.restart, 1e-9)
        else:
            done = step / max(self._total if state.cut is None else state.cut, 1e-9)
        return min(max(done, 0.0), 1.0)

    # ---- what a run reports ------------------------------------------------------------------

    @property
    def planned_epoch(self) -> float | None:
        """Epochs done at the planned end of the first cycle."""
        cut = self.state.cut
        return None if cut is None else cut / self._total * self._config.epochs

    @property
    def is_open(self) -> bool:
        """Whether it is not known yet when masks are frozen."""
        return self.state.cut is None and self.state.restart is None

    def learn(self, step: float, cut_epoch: float) -> None:
        """Fall in a line, from the rate at ``step``, to the floor at the cut, which is known now."""
        self.state.level, self.state.learned = self(step), step
        self.state.cut = self._step_of(cut_epoch)

    @property
    def wants_losses(self) -> bool:
        """Whether the height depends on the losses before the cut."""
        return self._config.second_cycle == "loss" and self.state.restart is None

    def note_loss(self, loss: float) -> None:
        """Take the training loss of a batch."""
        self.state.losses = [*self.state.losses[1 - DAMAGE_BATCHES :], loss]

    def restart(self, step: float, damage: float = 0.0) -> float:
        """Begin the second cycle with this step; the height.

        Where the settings do not fix it, the larger of ``damage`` and the share of the run that is left, as
        in adaptive linear restarting (Zimmer et al. 2023, section 3), which compares with the length of the
        first training.
        """
        fixed = self._config.second_cycle
        left = (self._total - step) / self._total
        height = min(max(damage, left, 0.0), 1.0) if fixed is None or isinstance(fixed, str) else fixed
        self.state.restart, self.state.height, self.state.losses = step, height, []
        return height

    def state_dict(self) -> dict[str, Any]:
        """As plain numbers."""
        return dataclasses.asdict(self.state)

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.state = CycleState(**saved)
        self._plan()


def damage_by_norm(energy_outside: float, sparsity: float) -> float:
    """``|W - W'| / (|W| sqrt(s))``: the norm that freezing took away, over that of as many average weights.

    Zimmer et al. 2023, section 3: 1 if the weights that went were as large as the others. ``energy_outside``
    is the share of the squared norm, ``sparsity`` s that of the weights.
    """
    return min(math.sqrt(energy_outside / sparsity), 1.0) if sparsity > 0 else 0.0


def damage_by_loss(before: float, after: float, guessing: float) -> float:
    """How far freezing threw the loss back towards that of guessing: 0 is not at all, 1 all the way."""
    if not after > before:
        return 0.0
    room = guessing - before
    return min((after - before) / room, 1.0) if room > 0 else 1.0
