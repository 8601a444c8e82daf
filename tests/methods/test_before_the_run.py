"""What is said before a run starts: too short for a method, or a target that these settings do not reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from own_loop import make
from torch import nn

from clicktrain.errors import UserError
from clicktrain.methods import METHODS, Pruner
from clicktrain.methods.outcome import planned_far_off


def attached(method: str, epochs: int, batches: int, **settings: Any) -> Pruner:
    model, optimizer = make()
    return METHODS[method](**settings).attach(
        model, optimizer, epochs=epochs, steps_per_epoch=batches, example=torch.zeros(2, 3, 8, 8)
    )


LONGER = "give more epochs or a smaller batch_size"
SHORT = [
    (
        "clicktrain",
        1,
        f"a run of 2 batches is too short for the stages of ClickTrain, which need 5 here: {LONGER}",
    ),
    ("clicktrain-gradual", 2, f"take 3 before masks move; {LONGER}"),
    (
        "granet",
        1,
        rf"too short for GraNet: masks are fixed after 1 \(stop 0.6\) and would never change; {LONGER}",
    ),
    (
        "gmp",
        1,
        r"a run of 2 batches is too short for GMP: masks are fixed after 1 \(stop 0.6, start 0.1\) and",
    ),
    ("campfire", 1, "too short for the era of preset default, epochs 0.3 to 0.5, which holds no batch: give"),
    ("prunetrain-clicktrain", 1, "a run of 1 epoch is too short for PruneTrain, then ClickTrain"),
    ("prunetrain-clicktrain", 3, "from epoch 1 on: a run of 4 batches is too short for the stages of"),
]


@pytest.mark.parametrize(("method", "epochs", "sentence"), SHORT)
def test_a_run_that_is_too_short_says_what_would_be_long_enough(
    method: str, epochs: int, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        attached(method, epochs, 2)


def test_an_interval_of_ones_own_is_named() -> None:
    with pytest.raises(UserError, match="interval is 50 but masks are fixed after 8 of 10 batches"):
        attached("rigl", 1, 10, interval=50)


def test_a_ratio_that_removes_nothing() -> None:
    with pytest.raises(UserError, match=r"prune_ratio 0.001 of \d+ filters is none: ask for 0.\d+ or more"):
        attached("pat", 3, 4, prune_ratio=0.001)


@pytest.mark.parametrize(
    ("asked", "planned", "said"),
    [
        (0.6, 0.611, ""),
        (0.8, 0.81, ""),
        (0.01, 0.108, "; that is more than 5% from what was asked, and this network allows nothing closer"),
        (
            0.999,
            0.988,
            "; that is 12 times the weights that were to be kept, and this network allows nothing closer",
        ),
        (0.9, 0.89, ""),
        (8.0, 8.01, ""),
        (8.0, 7.0, "; that is more than 5% from what was asked, and this network allows nothing closer"),
    ],
)
def test_what_is_far_off(asked: float, planned: float, said: str) -> None:
    assert planned_far_off(asked, planned) == said


def test_a_plan_knows_of_a_target_that_will_be_missed() -> None:
    warned = attached("campfire", 5, 4, sparsity=0.9999).plan().warning
    assert warned is not None
    assert warned.startswith("sparsity asked 0.9999, planned 0.9")
    assert attached("campfire", 5, 4, sparsity=0.6).plan().warning is None
    assert attached("rigl", 5, 40, sparsity=0.8).plan().warning is None


def test_networks_without_anything_to_prune_have_no_warning() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert METHODS["dense"]().attach(model, optimizer, epochs=1, steps_per_epoch=1).plan().warning is None
