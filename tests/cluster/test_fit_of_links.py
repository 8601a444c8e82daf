"""Latency and bandwidth from measured rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clicktrain.cluster import Link, MeasuredRow, fit_links, read_rows
from clicktrain.cluster.fit import fit_link, modeled_seconds
from clicktrain.errors import UserError

TRUTH = Link("slow", 12.5e6, 2e-4)


def rows(link: Link = TRUTH, name: str = "slow") -> list[MeasuredRow]:
    cases = [("dense", 2, 4e6), ("4x", 2, 1e6), ("dense", 4, 4e6), ("4x", 4, 1e6), ("10x", 4, 4e5)]
    plain = [MeasuredRow(what, processes, name, size, 1.0) for what, processes, size in cases]
    return [
        MeasuredRow(row.what, row.processes, name, row.num_bytes, 1e3 * modeled_seconds(row, link))
        for row in plain
    ]


def test_what_the_model_has_made_is_found_again() -> None:
    other = Link("fast", 1e9, 5e-5)
    slow, fast = fit_links(rows() + rows(other, "fast"))
    for fit, truth in ((slow, TRUTH), (fast, other)):
        assert fit.link.name == truth.name
        assert fit.link.bandwidth == pytest.approx(truth.bandwidth)
        assert fit.link.latency == pytest.approx(truth.latency)
        assert fit.largest_error < 1e-9
        assert len(fit.rows) == 5


def test_a_row_that_the_model_does_not_explain_shows() -> None:
    measured = rows()
    odd = measured[2]
    measured[2] = MeasuredRow(odd.what, odd.processes, odd.link, odd.num_bytes, 1.5 * odd.exchange_ms)
    (fit,) = fit_links(measured)
    assert fit.rows[2].error == pytest.approx(1 / 1.5 - 1)  # the others are right
    assert fit.largest_error >= 1 / 3 - 1e-9


def test_calls_and_steps_where_they_were_measured() -> None:
    """Two messages: the first leaves in the middle of the backward pass of 20 ms, the second at its end."""
    link = Link("x", 1e8, 0.0)
    cases = [MeasuredRow(what, 2, "x", size, size / 1e5, 2, 30.0, 30.0) for what, size in
             (("a", 4e6), ("b", 2e6), ("c", 1e6))]  # fmt: skip
    (fit,) = fit_links(cases)
    assert fit.link.bandwidth == pytest.approx(link.bandwidth)
    assert [one.predicted_step_ms for one in fit.rows] == pytest.approx([30 + 40 - 10, 30 + 10, 30 + 5])
    assert fit.rows[1].step_error == pytest.approx(40 / 30 - 1)
    assert fit.median_step_error == pytest.approx(40 / 30 - 1)
    assert fit_links(rows())[0].median_step_error is None


def test_nothing_is_negative() -> None:
    """Times that fall with the bytes, and times without any latency."""
    odd = [
        MeasuredRow("a", 2, "x", 1e6, 5.0),
        MeasuredRow("b", 2, "x", 2e6, 4.0),
        MeasuredRow("c", 2, "x", 3e6, 3.0),
    ]
    link = fit_link("x", odd)
    assert link.latency > 0
    assert link.bandwidth == float("inf")
    pure = [MeasuredRow("a", 2, "x", size, size / 1e4 - 1) for size in (2e5, 4e5, 8e5)]
    assert fit_link("x", pure).latency == 0


def test_files_of_the_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    row = {"what": "dense", "processes": 2, "link": "1 Gbit/s", "bytes_per_step": 1000, "exchange_ms": 2.5}
    path.write_text(json.dumps({"machine": {}, "rows": [{**row, "processes": 1, "exchange_ms": 0}, row]}))
    assert read_rows(path) == [MeasuredRow("dense", 2, "1 Gbit/s", 1000, 2.5)]
    path.write_text(json.dumps([{**row, "calls_per_step": 3, "step_ms": 20.0, "compute_ms": 18.0}]))
    assert read_rows(path) == [MeasuredRow("dense", 2, "1 Gbit/s", 1000, 2.5, 3, 20.0, 18.0)]
    assert [message.num_bytes for message in read_rows(path)[0].messages] == pytest.approx([1000 / 3] * 3)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"machine": {}}, "holds no rows: write it by 'clicktrain bench exchange --json"),
        ([{"what": "dense"}], "row 0 has processes None"),
        ([3], "row 0 is 3: an object is needed"),
        (
            [{"what": "a", "processes": 2, "link": "x", "bytes_per_step": -1, "exchange_ms": 1}],
            "row 0 has bytes_per_step -1",
        ),
        (
            [{"what": "a", "processes": 2, "link": "x", "bytes_per_step": 1, "exchange_ms": 0}],
            "row 0 has exchange_ms 0: no time was measured",
        ),
    ],
)
def test_other_files_are_refused(content: object, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_rows(path)
    assert sentence in str(caught.value)


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="link 'slow' has 2 rows: 3 or more are needed"):
        fit_links(rows()[:2])
    with pytest.raises(UserError, match="no rows of two processes or more"):
        fit_links([])
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(tmp_path / "none.json")
