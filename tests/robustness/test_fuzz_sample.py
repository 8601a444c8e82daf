"""A sample of the fuzz on every change; `make fuzz` runs all of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import fuzz_runs
import pytest
from cases import Case, judge
from fuzz import CATEGORIES, all_cases

SAMPLE = {"flags": 20, "yaml": 20, "run folders": 12, "data": 40, "factories": 10, "own loops": 12}
"""Cases of every category, different for every seed."""


@pytest.fixture(scope="module", autouse=True)
def _runs_are_forgotten() -> Iterator[None]:
    yield
    fuzz_runs.forget_runs()


@pytest.mark.parametrize("category", SAMPLE)
def test_a_sample_is_right(category: str) -> None:
    cases = all_cases(0, category)
    picked = random.Random(5).sample(cases, SAMPLE[category])
    wrong = [f"{v.case.what}: {v.why}" for v in map(judge, picked) if not v.right]
    assert not wrong, "\n".join(wrong)


def test_there_are_enough_cases_and_a_seed_names_them() -> None:
    cases = all_cases(3)
    assert len(cases) >= 1500
    assert {case.category for case in cases} == set(CATEGORIES)
    assert [case.what for case in cases] == [case.what for case in all_cases(3)]
    assert [case.what for case in cases] != [case.what for case in all_cases(4)]


def runs_code(place: Path) -> None:
    (place / "code_was_run").touch()


def raises(place: Path) -> None:
    raise KeyError("x")


def writes_and_refuses(place: Path) -> list[str]:
    return ["report", "missing", "-o", "page.html"]


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Case("data", "", runs_code), "code ran"),
        (Case("data", "", raises), "KeyError"),
        (Case("data", "", lambda place: None, "refused"), "should be refused"),
        (Case("flags", "", lambda place: ["train", "--epochs", "x"], "accepted"), "should be accepted"),
        (Case("flags", "", writes_and_refuses), ""),
    ],
)
def test_the_judge(case: Case, why: str) -> None:
    assert why in judge(case).why
    assert judge(case).right == (why == "")
