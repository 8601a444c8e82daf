"""The learning rate around the cut, against curves written down step by step; and in whole runs."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from short_runs import (
    BATCH_IN_STAGE,
    BATCHES,
    DENSE,
    FIVE_STAGES,
    At,
    Killed,
    Messages,
    assert_same_run,
    kill,
    resume,
    run,
)

from clicktrain.errors import UserError
from clicktrain.train import RunConfig, RunFolder, StepProgress, TrainingInterrupted
from clicktrain.train.optim import BatchSizes
from clicktrain.train.second_cycle import SecondCycle, damage_by_loss, damage_by_norm

TOTAL, CUT = 100, 40


def cycles(cut: float | None = CUT / 10, **settings: Any) -> SecondCycle:
    """A run of 10 epochs of 10 steps, whose masks are frozen after 40 of them."""
    return SecondCycle(RunConfig(epochs=10, **{"second_cycle": 0.5, **settings}), TOTAL, cut)


def fall(schedule: str, step: int, begin: float) -> float:
    """1 at ``begin``, 0 at the cut."""
    share = (step - begin) / (CUT - begin)
    return (1 + math.cos(math.pi * share)) / 2 if schedule == "cosine" else 1 - share


@pytest.mark.parametrize("schedule", ["cosine", "linear", "triangular"])
@pytest.mark.parametrize("warmup", [0, 1])
def test_the_first_cycle_ends_at_the_floor_and_the_second_at_zero(schedule: str, warmup: int) -> None:
    cycle = cycles(schedule=schedule, warmup_epochs=warmup, cycle_floor=0.1)
    begin = 10 * warmup if warmup or schedule != "triangular" else 0.23 * CUT
    rates = []
    for step in range(TOTAL):
        if step == CUT:
            cycle.restart(step)
        rates.append(cycle(step))
    for step, rate in enumerate(rates):
        if step < begin:
            wanted = 0.2 + 0.8 * step / begin if schedule == "triangular" else (step + 1) / begin
        elif step < CUT:
            wanted = 0.1 + 0.9 * fall(schedule, step, begin)
        else:
            wanted = 0.5 * (TOTAL - step) / (TOTAL - CUT)
        assert rate == pytest.approx(wanted), step
    assert cycle(TOTAL) == 0


def test_onecycle_falls_to_the_floor_too() -> None:
    cycle = cycles(schedule="onecycle")
    assert cycle(0) == pytest.approx(1 / 25)
    assert cycle(0.3 * CUT - 1) == pytest.approx(1)
    assert cycle(CUT - 1) == pytest.approx(0.05, abs=1e-4)


def test_a_cut_that_is_early_or_late() -> None:
    cycle = cycles(schedule="linear")
    assert cycle(45) == cycle(CUT) == pytest.approx(0.05)  # late: it stays at the floor
    cycle.restart(30)
    assert cycle(30) == 0.5
    assert cycle(65) == pytest.approx(0.25)


def test_a_cut_that_becomes_known_while_training() -> None:
    cycle = cycles(None, schedule="linear")
    assert cycle.is_open
    assert [cycle(step) for step in (0, 10, 20)] == pytest.approx([1, 0.9, 0.8])
    cycle.learn(20, 3.0)
    assert not cycle.is_open
    assert cycle.planned_epoch == pytest.approx(3)
    assert [cycle(step) for step in (20, 25, 30, 33)] == pytest.approx([0.8, 0.425, 0.05, 0.05])
    cycle.restart(31)
    assert cycle(31) == 0.5
    # After the rate has fallen below the floor, it does not rise to it.
    low = cycles(None, schedule="linear")
    low.learn(97, 9.9)
    assert low(99) == pytest.approx(0.03)


def test_its_state_is_the_whole_of_it() -> None:
    for cut in (4.0, None):
        for moment in ("known", "restarted"):
            cycle, other = cycles(cut), cycles(cut)
            if cut is None:
                cycle.learn(15, 4.2)
            if moment == "restarted":
                cycle.restart(41, 0.3)
            other.load_state(cycle.state_dict())
            assert [other(step) for step in range(TOTAL)] == [cycle(step) for step in range(TOTAL)]


def test_the_share_of_a_cycle() -> None:
    cycle = cycles()
    assert [cycle.share(step) for step in (0, 20, 40, 45)] == [0, 0.5, 1, 1]
    cycle.restart(40)
    assert [cycle.share(step) for step in (40, 70, 100)] == [0, 0.5, 1]
    assert cycles(None).share(20) == pytest.approx(0.2)


def test_the_height_follows_the_damage_or_the_time_left() -> None:
    """BIMP: the larger of both. Kept 3 of 5 weights 3, 2, 2 | 1, 1: the norm that went is sqrt(2 / 19)."""
    damage = damage_by_norm(2 / 19, 0.4)
    assert damage == pytest.approx(math.sqrt(2) / (math.sqrt(19) * math.sqrt(0.4)))
    assert cycles(second_cycle="norm").restart(80, damage) == pytest.approx(damage)
    assert cycles(second_cycle="norm").restart(20, damage) == pytest.approx(0.8)
    assert cycles(second_cycle=0.3).restart(20, damage) == 0.3
    assert damage_by_norm(0.9, 0.5) == 1
    assert damage_by_norm(0.0, 0.0) == 0
    assert damage_by_loss(1.0, 1.5, math.log(10)) == pytest.approx(0.5 / (math.log(10) - 1))
    assert damage_by_loss(1.0, 0.9, math.log(10)) == 0
    assert damage_by_loss(1.0, 5.0, math.log(10)) == 1
    assert damage_by_loss(3.0, 3.1, math.log(10)) == 1  # worse than guessing before


def test_with_batches_that_grow() -> None:
    """Positions in the run count, not steps; the batch's own factor comes on top."""
    cycle, sizes = cycles(schedule="linear"), BatchSizes(32, 10, 1)
    sizes.resize(2, 64, 5, 2.0)
    positions = [sizes.schedule_step(step) for step in (20, 25, 29, 30)]
    assert positions == [20, 30, 38, 40]
    cycle.restart(sizes.schedule_step(30))
    assert cycle(sizes.schedule_step(45)) == pytest.approx(0.25)  # 70 of 100: half of the second cycle


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"second_cycle": 0}, "second_cycle is 0: must be above 0"),
        ({"second_cycle": "bimp"}, "second_cycle is 'bimp': use a number or norm, loss"),
        ({"second_cycle": 1.0, "schedule": "constant"}, "schedule constant does not fall to a floor"),
        ({"cycle_floor": 1.0}, "cycle_floor is 1.0: must be at least 0 and below 1"),
    ],
)
def test_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        RunConfig(**settings)


def test_refused_with_the_moment_of_the_cut() -> None:
    with pytest.raises(UserError, match="freezes its masks at the end of the run"):
        cycles(10.0)
    with pytest.raises(UserError, match="warmup_epochs is 5 but masks are frozen after 4 epochs"):
        cycles(warmup_epochs=5)


class Rates(Messages):
    """Notes the learning rate of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def step(self, info: StepProgress) -> None:
        self.rates.append(info.learning_rate)


CYCLES = {**FIVE_STAGES, "second_cycle": 0.8, "schedule": "triangular", "cycle_floor": 0.1}
CUT_AT = 50
"""Batches: 30% of 66, then three times 15% of it."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    path, rates = tmp_path_factory.mktemp("whole") / "run", Rates()
    run(path, CYCLES, rates)
    return path, rates.rates


def restart_of(path: Path) -> dict[str, Any]:
    (event,) = [e for e in RunFolder(path).read_events() if e["event"] == "learning_rate_restart"]
    return event


def test_in_a_run(whole: tuple[Path, list[float]]) -> None:
    path, rates = whole
    total, top = 6 * BATCHES, 0.23 * CUT_AT
    for step, rate in enumerate(rates):
        if step < top:
            wanted = 0.2 + 0.8 * step / top
        elif step < CUT_AT:
            wanted = 0.1 + 0.9 * (CUT_AT - step) / (CUT_AT - top)
        else:
            wanted = 0.8 * (total - step) / (total - CUT_AT)
        assert rate == pytest.approx(0.05 * wanted), step
    metrics = RunFolder(path).read_metrics()
    assert [line["learning_rate"] for line in metrics] == rates[BATCHES - 1 :: BATCHES]
    event = restart_of(path)
    assert (event["height"], event["rule"]) == (0.8, "fixed")
    assert event["planned_epoch"] == pytest.approx(CUT_AT / BATCHES)


@pytest.mark.parametrize("batch", [CUT_AT - 1, CUT_AT])
def test_resumed(tmp_path: Path, whole: tuple[Path, list[float]], batch: int) -> None:
    """From the checkpoints right before and after the cut."""
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "run", CYCLES, At(batch, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    rates = Rates()
    resume(tmp_path / "run", rates)
    assert_same_run(tmp_path / "run", whole[0])
    assert rates.rates == whole[1][-len(rates.rates) :]


@pytest.mark.parametrize("rule", ["norm", "loss"])
def test_height_by_damage_resumed(tmp_path: Path, rule: str) -> None:
    settings = {**CYCLES, "second_cycle": rule, "penalty": "none", "mixup": 0.2, "accumulate": 2}
    settings["checkpoint_every"] = 2
    run(tmp_path / "whole", settings)
    event = restart_of(tmp_path / "whole")
    left = 1 - (event["step"] + 1) / (6 * math.ceil(BATCHES / 2))
    assert event["height"] == pytest.approx(max(event["damage"], left))
    assert event["damage"] > 0
    if rule == "loss":
        by_hand = damage_by_loss(event["loss_before"], event["loss_after"], math.log(10))
        assert event["damage"] == by_hand
    with pytest.raises(Killed):
        run(tmp_path / "run", settings, At(BATCH_IN_STAGE["finalize"], kill))
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_cut_that_a_trigger_decides(tmp_path: Path) -> None:
    """The schedule goes on until stage 2 begins; from there it falls to the floor at the cut."""
    settings = {
        **CYCLES,
        "trigger": "loss_slope",
        "loss_slope": 1e9,
        "latest_start": 0.4,
        "earliest_start": 0.2,
    }
    rates = Rates()
    run(tmp_path / "run", settings, rates)
    stages = {
        e["stage"]: e["step"] for e in RunFolder(tmp_path / "run").read_events() if e["event"] == "stage"
    }
    begin, cut = stages["pool"], stages["accelerated"]
    assert begin < 0.4 * 66
    total, top = 66, 0.23 * 66
    free = [(total - step) / (total - top) for step in range(16, begin)]
    assert rates.rates[16:begin] == pytest.approx([0.05 * value for value in free])
    level = (total - begin) / (total - top)
    for step in range(begin, cut):
        share = (step - begin) / (cut - begin)
        assert rates.rates[step] == pytest.approx(0.05 * (level + (0.1 - level) * share))
    assert rates.rates[cut] == pytest.approx(0.05 * 0.8)


def test_methods_without_a_cut_keep_their_schedule_and_say_so(tmp_path: Path) -> None:
    heard, plain = Rates(), Rates()
    settings = {**DENSE, "epochs": 1}
    run(tmp_path / "run", {**settings, "second_cycle": 1.0}, heard)
    run(tmp_path / "plain", settings, plain)
    assert heard.rates == plain.rates
    assert any("second_cycle has no effect: method dense never" in text for text in heard.messages)


@pytest.mark.parametrize(
    ("settings", "epoch"),
    [
        ({"method": "gmp", "stop": 0.5}, 2.0),
        ({"method": "rigl", "stop": 0.5}, 2.0),
        ({"method": "nm", "stop": 0.75}, 3.0),
        ({"method": "campfire", "era": [1, 3]}, 3.0),
    ],
)
def test_other_methods_say_when_they_cut(tmp_path: Path, settings: dict[str, Any], epoch: float) -> None:
    run(tmp_path / "run", {**DENSE, **settings, "epochs": 4, "second_cycle": 1.0, "operators": "reference"})
    event = restart_of(tmp_path / "run")
    assert event["planned_epoch"] == pytest.approx(epoch, abs=0.05)
    assert event["step"] + 1 == round(BATCHES * epoch)
