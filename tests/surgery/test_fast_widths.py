"""Which multiple pays, on made-up times; measured once per device and layer, without a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from odd_graphs import network
from torch import nn

from clicktrain.errors import UserError
from clicktrain.surgery import fast_widths
from clicktrain.surgery.fast_widths import (
    LayerShape,
    WidthTable,
    best,
    measured_round_to,
    rounding_times,
    time_widths,
    typical_layer,
)

WIDTHS = range(8, 65)
SMALL = LayerShape(kernel=1, size=(4, 4), batch=2)


def up(width: int, multiple: int) -> int:
    while width % multiple:
        width += 1
    return width


def test_mean_times_and_extra_channels_by_loops() -> None:
    ms = {width: float((width * 7919) % 101 + width) for width in WIDTHS}
    for row in rounding_times(ms):
        assert row.ms == pytest.approx(sum(ms[up(w, row.multiple)] for w in WIDTHS) / len(WIDTHS))
        assert row.extra_channels == pytest.approx(sum(up(w, row.multiple) - w for w in WIDTHS) / sum(WIDTHS))


@pytest.mark.parametrize(
    ("name", "cost", "chosen"),
    [
        ("proportional: every channel counts", lambda w: w, 1),
        ("staircase: as slow as the multiple above, nothing to gain", lambda w: up(w, 16), 1),
        ("tensor cores: slow path unless a multiple of 8", lambda w: w * (1 if w % 8 == 0 else 2), 8),
        ("slow path unless a multiple of 16", lambda w: w * (1 if w % 16 == 0 else 3), 16),
        ("a little slower between multiples of 4: not worth it", lambda w: w + (4 if w % 4 else 0) * 0.6, 1),
    ],
)
def test_which_multiple_pays(name: str, cost: Any, chosen: int) -> None:
    assert best(rounding_times({width: float(cost(width)) for width in WIDTHS})) == chosen, name


def test_measured_once_per_device_and_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    multiple, table = measured_round_to("cpu", SMALL, rounds=1, folder=tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert multiple == table.chosen in fast_widths.MULTIPLES
    assert table.widths == tuple(WIDTHS)
    assert all(ms > 0 for ms in table.ms)
    assert WidthTable.from_json(json.loads(json.dumps(table.to_json()))) == table
    asked: list[LayerShape] = []

    def again(device: torch.device, layer: LayerShape, widths: Any, rounds: int) -> list[float]:
        asked.append(layer)
        return [float(width) for width in widths]

    monkeypatch.setattr(fast_widths, "time_widths", again)
    assert measured_round_to("cpu", SMALL, folder=tmp_path) == (multiple, table)
    assert not asked
    other = LayerShape(kernel=3, size=(4, 4), batch=2)
    assert measured_round_to("cpu", other, folder=tmp_path)[0] == 1
    assert asked == [other]
    for path in tmp_path.iterdir():  # damaged: measured again
        path.write_text("{", encoding="utf-8")
    measured_round_to("cpu", SMALL, folder=tmp_path)
    assert asked == [other, SMALL]


def test_the_table_is_told_in_words(tmp_path: Path) -> None:
    ms = {width: float(width * (1 if width % 8 == 0 else 2)) for width in WIDTHS}
    rows = rounding_times(ms)
    text = str(WidthTable("a device", SMALL, tuple(ms), tuple(ms.values()), rows, best(rows)))
    lines = text.splitlines()
    assert lines[1].split() == ["1", "100.0%", "0.0%"]
    assert [line.endswith("<- chosen") for line in lines[1:]] == [False, False, False, True, False, False]


def test_the_typical_layer_is_where_most_is_computed() -> None:
    layer = typical_layer(network("resnet20"), torch.zeros(2, 3, 32, 32, dtype=torch.float64), batch=32)
    assert layer == LayerShape(3, 1, (32, 32), 32)
    plain = nn.Sequential(
        nn.Conv2d(3, 64, 7, padding=3), nn.Conv2d(64, 32, 1), nn.Conv2d(32, 8, 3, stride=2, padding=1)
    )
    layer = typical_layer(plain, torch.zeros(1, 3, 8, 8), dtype=torch.bfloat16, channels_last=True)
    assert layer == LayerShape(1, 1, (8, 8), 64, "bfloat16", True)
    only_linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    assert typical_layer(only_linear, torch.zeros(1, 3, 2, 2)) == LayerShape()


@pytest.mark.parametrize("layer", [SMALL, LayerShape(3, 2, (6, 5), 2, "bfloat16", channels_last=True)])
def test_every_kind_of_layer_runs(layer: LayerShape) -> None:
    found = time_widths(torch.device("cpu"), layer, [8, 9], 2)
    assert len(found) == 2
    assert min(found) > 0


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rounds must be at least 1"):
        measured_round_to("cpu", SMALL, rounds=0, folder=tmp_path)
    with pytest.raises(UserError, match="no table of widths"):
        WidthTable.from_json({"version": 1})
