# ruff: noqa: RUF001 (the page has real minus and multiplication signs)
from __future__ import annotations

import pytest

from clicktrain import wording


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0%"),
        (1.0, "100%"),
        (0.41, "41%"),
        (0.004, "0.4%"),
        (0.9996, "99.96%"),
        (-0.031, "−3%"),
        (1.07, "107%"),
    ],
)
def test_percent_never_rounds_to_all_or_nothing(value: float | None, text: str) -> None:
    assert wording.percent(value) == text


def test_numbers() -> None:
    assert wording.fixed(-0.04) == "0.0"
    assert wording.fixed(-1.25, 2) == "−1.25"
    assert wording.points(0.31) == "+0.3"
    assert wording.points(-0.31) == "−0.3"
    assert wording.points(0.04) == "0.0"
    assert wording.times(8.03) == "8.0×"
    assert wording.times(123.4) == "123×"
    assert wording.integer(272474) == "272,474"
    assert wording.shape([64, 32, 3, 3]) == "64×32×3×3"
    assert wording.epoch(18.0) == "18"
    assert wording.epoch(18.256) == "18.26"
    assert wording.sentence_list(["a", "b", "c"]) == "a, b and c"
    assert wording.setting({"conv1": 2.0}) == '{"conv1": 2.0}'
    assert wording.setting(True) == "true"
    assert wording.setting(8.0) == wording.setting(8) == "8"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (62_700, "62.7 kB"), (1_090_000, "1.09 MB"), (999_950, "1.00 MB")],
)
def test_quantities_have_three_digits(value: float, text: str) -> None:
    assert wording.file_size(value) == text


@pytest.mark.parametrize(
    ("seconds", "long", "short"),
    [
        (42.14, "42.1 s", "42.1 s"),
        (483, "8 min 03 s", "8.1 min"),
        (7500, "2 h 05 min", "2.1 h"),
        (59.99, "1 min 00 s", "1.0 min"),
    ],
)
def test_durations(seconds: float, long: str, short: str) -> None:
    assert wording.duration(seconds) == long
    assert wording.short_duration(seconds) == short


def test_savings_are_not_claimed_where_there_are_none() -> None:
    assert wording.saved(0.59, "training FLOPs") == "41% of training FLOPs saved"
    assert wording.saved(1.0, "training FLOPs") == "as many training FLOPs as dense"
    assert wording.saved(1.2, "training FLOPs") == "20% more training FLOPs"
