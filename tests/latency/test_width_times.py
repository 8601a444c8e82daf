"""Tables of layer times: monotone, interpolated, cached."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clicktrain.errors import UserError
from clicktrain.latency.width_times import LayerGeometry, WidthTimes, width_times

CPU = torch.device("cpu")
CONV = LayerGeometry(16, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, (6, 6))


@given(
    grid=st.lists(st.lists(st.floats(0.01, 9), min_size=4, max_size=4), min_size=3, max_size=3),
    points=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 40)), min_size=2, max_size=2),
)
def test_fewer_channels_never_cost_more(grid: list[list[float]], points: list[tuple[int, int]]) -> None:
    inputs, outputs = (2, 8, 16), (4, 8, 16, 32)
    times = WidthTimes.of(
        inputs, outputs, {(i, o): grid[a][b] for a, i in enumerate(inputs) for b, o in enumerate(outputs)}
    )
    (i1, o1), (i2, o2) = points
    assert times.at(min(i1, i2), min(o1, o2)) <= times.at(max(i1, i2), max(o1, o2)) + 1e-12


def test_monotone_measurements_are_kept_and_interpolated_by_hand() -> None:
    times = WidthTimes.of((2, 4), (1, 3), {(2, 1): 1.0, (2, 3): 2.0, (4, 1): 3.0, (4, 3): 6.0})
    assert times.ms == ((1.0, 2.0), (3.0, 6.0))
    assert [times.at(2, 1), times.at(4, 3), times.at(3, 2)] == [1.0, 6.0, 3.0]
    assert times.at(1, 1) == 1.0
    assert times.at(99, 99) == 6.0
    crooked = WidthTimes.of((2, 4), (1,), {(2, 1): 3.0, (4, 1): 1.0})
    assert crooked.ms == ((2.0,), (2.0,)), "neither measurement is believed more"


@pytest.mark.parametrize(
    ("geometry", "points"),
    [
        (CONV, ((2, 4, 8, 12, 16), (1, 2, 4, 6, 8))),
        (replace(CONV, inputs=3, inputs_vary=False), ((3,), (1, 2, 4, 6, 8))),
        (LayerGeometry(8, 8, (3, 3), (2, 2), (1, 1), (1, 1), 0, (6, 6)), ((8,), (1, 2, 4, 6, 8))),
        (LayerGeometry(16, 16, (3, 3), (1, 1), (1, 1), (1, 1), 4, (6, 6)), ((4, 8, 12, 16), (4, 8, 12, 16))),
        (LayerGeometry(16, 10, outputs_vary=False), ((2, 4, 8, 12, 16), (10,))),
    ],
    ids=["conv", "first", "depthwise", "grouped", "linear"],
)  # fmt: skip
def test_every_point_runs(geometry: LayerGeometry, points: tuple[tuple[int, ...], ...]) -> None:
    assert geometry.points() == points
    for i in points[0]:
        for o in points[1]:
            result = geometry.call(i, o, 2, CPU)()
            assert isinstance(result, torch.Tensor)
            assert result.shape[:2] == (2, o)


def test_measured_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLICKTRAIN_LATENCY_CACHE", str(tmp_path / "cache"))
    told: list[str] = []
    first = width_times([CONV, CONV], 2, CPU, told.append)
    assert told == ["measuring a layer of 16 -> 8 channels, batch 2"]
    assert width_times([CONV], 2, CPU, told.append) == first
    assert len(told) == 1
    width_times([CONV], 3, CPU, told.append)
    assert len(told) == 2, "another batch is another table"
    for path in (tmp_path / "cache").iterdir():
        path.write_text(json.dumps({"inputs": [1], "outputs": [1], "ms": [[1.0]]}))
    assert width_times([CONV], 2, CPU, told.append)[CONV].inputs == (2, 4, 8, 12, 16)
    assert len(told) == 3, "a table with other points is measured anew"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        width_times([CONV], 2, CPU, told.append)
        assert len(told) == 4, "other threads, other times"
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(UserError, match="at least 1 image"):
        width_times([CONV], 0, CPU)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CLICKTRAIN_LATENCY_CACHE", str(tmp_path / "file" / "cache"))
    assert CONV in width_times([CONV], 1, CPU)
