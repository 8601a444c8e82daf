"""Figure 4 of PruneTrain on the page: lines of channels, what ends, what came back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from html_tree import Node, parse
from run_folders import make_run, make_shrinking_run

from clicktrain.errors import UserError
from clicktrain.report import write_report
from clicktrain.report.channel_weights import MOST_LINES, MOST_POINTS, recorded_channels
from clicktrain.report.run_data import read_runs
from clicktrain.train import RunConfig, resolve_method
from clicktrain.train.fit import fit

TITLE = "Largest weight of each channel: "
# Three epochs of a layer of four channels: 1 goes after the first, 3 was zero and comes back.
LINES: list[dict[str, Any]] = [
    {
        "epoch": 1,
        "channels": {"outputs": {"a": [0, 1, 2, 3]}, "inputs": {}},
        "outputs": {"a": [0.5, 0, 0.2, 0.00001]},
        "inputs": {},
    },
    {
        "epoch": 2,
        "channels": {"outputs": {"a": [0, 2, 3]}, "inputs": {}},
        "outputs": {"a": [0.4, 0.02, 0.003]},
        "inputs": {},
    },
    {"epoch": 3, "outputs": {"a": [0.3, 0.01, 0.002]}, "inputs": {}},
]


def page_of(*folders: Path) -> Node:
    target = write_report(list(folders), folders[0].parent / "report.html")
    return parse(target.read_text(encoding="utf-8"))


def drawn(page: Node) -> dict[str, Node]:
    found = {figure.all("h4")[0].text: figure for figure in page.all("figure")}
    return {t.removeprefix(TITLE): figure for t, figure in found.items() if t.startswith(TITLE)}


def write(folder: Path, lines: list[dict[str, Any]]) -> None:
    (folder / "channels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_lines_are_those_of_the_channels_they_name(tmp_path: Path) -> None:
    folder = make_shrinking_run(tmp_path / "run", every=1, epochs=3)
    write(folder, LINES)
    (run,) = read_runs([folder])
    (layer,) = recorded_channels(run)
    assert layer.points == {
        0: [(1, 0.5), (2, 0.4), (3, 0.3)],
        1: [(1, 0.0)],
        2: [(1, 0.2), (2, 0.02), (3, 0.01)],
        3: [(1, 1e-5), (2, 0.003), (3, 0.002)],
    }
    assert layer.removed == {1}
    assert layer.came_back(1e-4) == {3: 0.003}
    assert layer.small(1e-4) == 2
    assert layer.unread(1e-4) == 0
    figure = drawn(page_of(folder))["a"]
    assert "all 4 output channels" in figure.one("figcaption").text
    assert (
        "Of all 4, 2 came under the threshold and 1 was removed before epoch 3; "
        "1 that had been under it came back, to at most 0.003." in figure.one("figcaption").text
    )
    paths = {p.one("title").text: p for p in figure.all("path", "hair")}
    assert list(paths) == [
        "channel 0: 0.3", "channel 1: removed after epoch 1", "channel 2: 0.01", "channel 3: 0.002",
    ]  # fmt: skip
    heights = {t.text: float(t.attributes["y"]) - 4 for t in figure.all("text", "y")}
    assert list(heights) == ["0", "1e-5", "1e-4", "1e-3", "0.01", "0.1", "1"]
    # A decade is as high as any other; 0.2, 0.02 and 0.01 lie where their logarithms do.
    decade = heights["0.01"] - heights["0.1"]
    places = [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", paths["channel 2: 0.01"].attributes["d"])]
    assert places == pytest.approx(
        [heights["1"] + decade * 0.699, heights["1"] + decade * 1.699, heights["0.01"]], abs=0.02
    )
    (dot,) = figure.all("circle")
    assert float(dot.attributes["cy"]) == pytest.approx(heights["0"], abs=0.02)
    (threshold,) = figure.all("line", "reference")
    assert float(threshold.attributes["y1"]) == pytest.approx(heights["1e-4"], abs=0.02)
    assert len(figure.all("line", "dotted")) == 3


def test_what_no_layer_reads_goes_with_large_weights(tmp_path: Path) -> None:
    folder = make_shrinking_run(tmp_path / "run", every=1, epochs=3)
    write(folder, [{**LINES[0], "outputs": {"a": [0.5, 0.3, 0.2, 0.1]}}, *LINES[1:]])
    caption = drawn(page_of(folder))["a"].one("figcaption").text
    assert (
        "0 came under the threshold and 1 was removed before epoch 3 (1 of them with weights over" in caption
    )
    assert caption.endswith("none came back.")


def test_wide_layers_and_long_runs_stay_small(tmp_path: Path) -> None:
    folder = make_shrinking_run(tmp_path / "run")
    count, epochs = 500, 300
    numbers = {f"layer{i}": list(range(count)) for i in range(9)}
    lines: list[dict[str, Any]] = [
        {"epoch": e, "outputs": {n: [1 / e] * count for n in numbers}, "inputs": {}}
        for e in range(1, epochs + 1)
    ]
    lines[0]["channels"] = {"outputs": numbers, "inputs": {}}
    write(folder, lines)
    figures = drawn(page_of(folder))
    assert list(figures) == ["layer1", "layer4", "layer7"]
    for figure in figures.values():
        paths = figure.all("path", "hair")
        assert len(paths) == MOST_LINES
        assert {p.attributes["d"].count("L") + 1 for p in paths} == {MOST_POINTS}
        assert paths[0].one("title").text.startswith("channel 0:")
        assert paths[-1].one("title").text.startswith("channel 499:")
        assert "32 of 500 output channels, evenly spaced, of one of 9 layers" in figure.one("figcaption").text
        assert "none came back" in figure.one("figcaption").text
    assert (tmp_path / "report.html").stat().st_size < 500_000


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = make_shrinking_run(tmp_path / "run")
    for lines in ([{"epoch": 1}], [LINES[2]], [{**LINES[0], "outputs": {"a": [1]}}]):
        write(folder, lines)
        with pytest.raises(UserError, match=r"channels.jsonl is damaged"):
            page_of(folder)


def test_real_runs_have_it_and_others_do_not(tmp_path: Path) -> None:
    data = "synthetic:classes=3,size=8,channels=1,train=96,val=16"
    common = {"model": "resnet8", "width": 0.25, "epochs": 3, "batch_size": 32, "data": data, "threads": 1}
    method = {"coefficient": 0.05, "interval": 1.0}
    fit(
        RunConfig(method="prunetrain", **common),
        resolve_method("prunetrain", **method),
        tmp_path / "channels",
    )
    fit(RunConfig(method="dense", **common), resolve_method("dense"), tmp_path / "dense")
    assert list(drawn(page_of(tmp_path / "channels"))) == [
        "layer1.0.conv1", "layer2.0.conv2", "layer3.0.conv2",
    ]  # fmt: skip
    assert not drawn(page_of(tmp_path / "dense", make_run(tmp_path / "made-up")))
