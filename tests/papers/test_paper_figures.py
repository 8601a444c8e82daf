"""The arithmetic of figures: values worked out by hand, and nothing but what it knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clicktrain.papers import Figure, Row, Step, measured_figures
from clicktrain.papers.figures import Missing, evaluate, names_in

RESULTS: dict[str, Any] = {
    "dense": {"val_accuracy": 80.0, "train_flops_ratio": 1.0, "nothing": None},
    "ct-8": {
        "val_accuracy": 78.5,
        "epochs": [{"seconds": 2.0}, {"seconds": 4.0}, {"other": 1}],
        "events": {"pool": [{"pools": [{"patterns": [1, 2, 3]}]}], "epi": [{"epi": None}, {"epi": 0.9}]},
    },
}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("dense.val_accuracy - ct_8.val_accuracy", 1.5),
        ("100 - 100 * dense.train_flops_ratio / 4", 75.0),
        ("mean(ct_8.epochs.seconds)", 3.0),
        ("max(ct_8.epochs.seconds) / ct_8.epochs.seconds[0]", 2.0),
        ("ct_8.epochs.seconds[-1]", 4.0),
        ("len(ct_8.events.pool[0].pools[0].patterns)", 3),
        ("min(ct_8.events.epi.epi)", 0.9),
        ("abs(-2)", 2),
    ],
)
def test_by_hand(expression: str, value: float) -> None:
    assert evaluate(expression, RESULTS.__getitem__) == pytest.approx(value)


@pytest.mark.parametrize(
    "expression",
    [
        "dense.other",
        "dense.nothing",
        "ct_8.epochs.seconds[5]",
        "ct_8.events.trigger.epoch[0]",
        "min(ct_8.epochs.none)",
        "1 / (dense.train_flops_ratio - 1)",
        "dense.val_accuracy[0]",
    ],
)
def test_what_is_not_there_is_missing(expression: str) -> None:
    with pytest.raises(Missing):
        evaluate(expression, RESULTS.__getitem__)


@pytest.mark.parametrize(
    "expression", ["open(dense)", "dense.x if dense else 1", "[dense]", "'a' * 9", "2 ** 99"]
)
def test_nothing_else_is_evaluated(expression: str) -> None:
    with pytest.raises(ValueError):
        evaluate(expression, RESULTS.__getitem__)


def test_names() -> None:
    assert names_in("mean(ct_8.epochs.seconds) / dense.val_accuracy") == {"ct-8", "dense"}


def test_mean_and_deviation_over_the_seeds_that_ended(tmp_path: Path) -> None:
    steps = []
    for seed, accuracy in ((0, 80.0), (1, 82.0), (2, None)):
        folder = tmp_path / f"dense-s{seed}"
        folder.mkdir()
        if accuracy is not None:
            (folder / "summary.json").write_text(json.dumps({"val_accuracy": accuracy}))
        steps.append(Step("dense", seed, ("train",), folder))
    (tmp_path / "pack.json").write_text('{"rows": [{"ratio": 3.0}]}')
    steps.append(Step("pack", None, ("bench", "pack"), tmp_path / "pack.json"))
    figures = (
        Figure("accuracy", 81, "dense.val_accuracy", "%"),
        Figure("over", "-", "dense.val_accuracy / pack.rows[0].ratio"),
        Figure("no", "-", "pack.rows[1].ratio"),
    )
    row = Row("clicktrain/eq-9", "9", "a row", figures=figures)
    accuracy, over, no = measured_figures(row, steps)
    assert (accuracy.value, accuracy.deviation, accuracy.seeds) == (81.0, pytest.approx(2**0.5), 2)
    assert accuracy.reason == "dense is not finished"
    assert over.value == pytest.approx(27.0)
    assert (no.value, no.seeds, no.reason) == (None, 0, "there is no pack.rows[1]")
