"""The page of a frontier: self-contained, with every point, and what it may claim."""

from __future__ import annotations

import re
from typing import Any

import pytest
from html_tree import Node, parse

from clicktrain.bench.frontier.chart import COSTS, round_numbers
from clicktrain.bench.frontier.page import FrontierData, to_html
from clicktrain.bench.frontier.points import Point

MACHINE = {"cpu": "<a CPU>", "threads": 1, "versions": {"torch": "2"}, "isa": ["x"], "compiler": "cc"}


def one(kind: Any, setting: str, width: float, epochs: int, accuracy: float | None, **more: Any) -> Point:
    cost = epochs * width**2 * (1 if kind == "dense" else 0.5)
    costs = {cost_of.field: cost for cost_of in COSTS} if accuracy is not None else {}
    return Point(
        kind=kind, name=f"{setting}-w{width:g}-e{epochs}", method=setting, setting=setting, width=width,
        epochs=epochs, seeds=3, accuracy_mean=accuracy, accuracy_of="test", accuracy_std=0.1, **costs, **more,
    )  # fmt: skip


def grid(widths: tuple[float, ...] = (0.25, 0.35, 0.5, 0.7, 1.0)) -> list[Point]:
    dense = [one("dense", "dense", w, e, 80 + 8 * w + e / 8) for w in widths for e in (8, 16, 32)]
    pruned = [
        one("pruned", "cut<b>", 1.0, 16, 91.0),
        one("pruned", "rigl", 1.0, 16, None, reason="1 of 3 runs failed: it collapsed"),
    ]
    return dense + pruned


def page_of(points: list[Point], **more: Any) -> Node:
    figures = {"engine": "fp32", "step_ms": 1.0, "evaluate_ms": 1.0, "latency_ms_b64": 1.0,
               "latency_ms_b1": 1.0, "latency_engine_b64": "a", "latency_engine_b1": "b"}  # fmt: skip
    times = {
        "networks": {"w1": figures},
        "machine": MACHINE,
        "settings": {"rounds": 7, "alone": True},
        "seconds": 60.0,
    }
    text = to_html(FrontierData("tiny", tuple(points), times, **more))
    assert "http" not in text.replace("http-equiv", "")
    assert "<script" not in text
    assert "<b>" not in text.replace("cut&lt;b&gt;", "")
    return parse(text)


def test_the_page_shows_every_point_and_every_cost() -> None:
    points = grid()
    page = page_of(points, missing=1)
    assert [figure.all("h4")[0].text for figure in page.all("figure")] == [cost.title for cost in COSTS]
    first = page.all("figure")[0]
    dots = first.all("circle", "dot")
    assert len(dots) == len(points) - 1  # the failed one has no place
    tips = [dot.one("title").text for dot in dots]
    assert any(re.fullmatch(r"cut<b>-w1-e16: 91.00% ± 0.10, .* points to dense-.*", tip) for tip in tips)
    assert len([key.text for key in first.one("ul", "keys").all("li")]) == 2
    rows = page.all("table", "runs")[0].all("tr")[1:]
    assert [row.all("th")[0].text for row in rows] == [point.name for point in points]
    assert "it collapsed" in rows[-1].text
    assert "1 run of the recipe not done yet" in page.text
    assert "<a CPU>" in page.text


def test_the_headline_claims_nothing_without_a_frontier() -> None:
    full = page_of(grid()).one("h1").text
    assert re.fullmatch(r"tiny: cut<b>-w1-e16 is [\d.]+ points above the best dense .*", full)
    few = page_of(grid((0.5, 1.0)))
    assert few.one("h1").text == "tiny: accuracy against cost"
    assert "no frontier yet" in few.one("span", "badge").text


def test_a_page_before_anything_is_timed_has_what_is_known() -> None:
    point = one("dense", "dense", 1.0, 8, None)
    text = to_html(FrontierData("tiny", (point,), None))
    assert parse(text).all("figure") == []
    assert "nothing is timed yet" in text


@pytest.mark.parametrize(("low", "high"), [(1.0, 9.0), (0.3, 3000.0), (7.1, 7.4), (1e12, 4e15), (5.0, 5.0)])
def test_ticks_of_a_logarithmic_axis_lie_inside_and_are_few(low: float, high: float) -> None:
    found = round_numbers(low, high)
    assert len(found) <= 6
    assert all(low <= value <= high for value in found)
    assert found == sorted(found)
