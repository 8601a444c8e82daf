"""What the page tells of networks that become smaller while they train."""

# ruff: noqa: RUF001 (the page has real multiplication signs)
from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from html_tree import Node, parse
from run_folders import make_pat_run, make_run, make_shrinking_run
from safetensors.numpy import load_file, save_file

from clicktrain.report import write_report
from clicktrain.report.channels import channel_view, flops_of_dense, layer_densities
from clicktrain.report.run_data import read_runs

FIGURES = [
    "FLOPs per image, % of dense",
    "When FLOPs were removed, %",
    "Memory per iteration, MB",
    "Images per batch",
    "Weight gradients, % of dense",
    "Batch-norm traffic per image, % of dense",
    "Density of each layer, %",
]


@pytest.fixture(scope="module")
def shrinking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shrinking_run(tmp_path_factory.mktemp("runs") / "prunetrain")


def page_of(*folders: Path) -> Node:
    target = write_report(list(folders), folders[0].parent / "report.html")
    return parse(target.read_text(encoding="utf-8"))


def figure(page: Node, title: str) -> Node:
    return next(f for f in page.all("figure") if f.all("h4")[0].text == title)


def titles(page: Node) -> list[str]:
    return [f.all("h4")[0].text for f in page.all("figure")]


def test_all_of_the_papers_figures(shrinking: Path) -> None:
    page = page_of(shrinking)
    found = titles(page)
    assert [title for title in found if title in FIGURES] == FIGURES
    caption = figure(page, "Memory per iteration, MB").one("figcaption").text
    assert "260 MB at first" in caption
    assert "the budget that batches grow in (260 MB)" in caption
    assert len(figure(page, "Memory per iteration, MB").all("line", "reference")) == 1
    assert "From 128 to 288 images; the learning rate grew to 2.25×" in figure(page, FIGURES[3]).text
    assert "1 MB per iteration at first" in figure(page, FIGURES[4]).one("figcaption").text
    assert "2 of 21 layers are removed" in figure(page, FIGURES[6]).one("figcaption").text


def test_flops_are_told_by_thirds(shrinking: Path) -> None:
    (run,) = read_runs([shrinking])
    points = dict(flops_of_dense(run))
    assert points[10] == 100.0
    assert points[11] == pytest.approx(100 * 0.75**2, abs=1e-3)
    total = points[1] - points[60]
    thirds = [points[1] - points[21], points[21] - points[41], points[41] - points[60]]
    expected = [f"{100 * third / total:.0f}%" for third in thirds]
    caption = figure(page_of(shrinking), "When FLOPs were removed, %").one("figcaption").text
    assert re.findall(r"\d+%", caption) == expected


def test_densities_of_layers(shrinking: Path) -> None:
    (run,) = read_runs([shrinking])
    found = {
        name: (channels, weights) for name, channels, weights in layer_densities(run, [*run.events][1::2])
    }
    assert found["layer3.2.conv1"] == (0.0, 0.0)
    channels, weights = found["layer2.1.conv1"]
    # 32 channels on either side; the last reconfiguration leaves 0.5 + 0.5 / 64 of them.
    assert channels == (16 / 32) ** 2
    alive = float((np.abs(run.weight("layer2.1.conv1")) > 1e-4).mean())
    assert weights == channels * alive
    assert 0 < alive < 1


def test_gated_layers_are_found_under_their_new_names(tmp_path: Path) -> None:
    folder = make_shrinking_run(tmp_path / "run", every=30)
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    for row in lines[-1]["layers"]:
        if row["name"] == "layer1.0.conv1":
            row["name"] = "layer1.0.conv1.layer"
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tensors = load_file(folder / "model.safetensors")
    tensors["layer1.0.conv1.layer.weight"] = tensors.pop("layer1.0.conv1.weight")
    save_file(tensors, folder / "model.safetensors")
    (run,) = read_runs([folder])
    events = [event for event in run.events if event["event"] == "reconfigured"]
    found = {name: (channels, weights) for name, channels, weights in layer_densities(run, events)}
    channels, weights = found["layer1.0.conv1"]
    assert channels == (10 / 16) ** 2
    assert weights is not None
    assert 0 < weights < channels
    assert "layer1.0.conv1.layer" not in found


def test_the_table_of_reconfigurations(shrinking: Path) -> None:
    page = page_of(shrinking)
    (region,) = [n for n in page.all("div", "scroll") if n.attributes.get("aria-label") == "Reconfigurations"]
    rows = [[c.text for c in row.all("td")] for row in region.all("tr")][1:]
    assert [row[0] for row in rows] == ["10", "20", "30", "40", "50", "60"]
    assert rows[0][2] == "layer3.2.conv1, layer3.2.conv2"
    assert rows[0][4:] == ["56.2%", "160", "0.25", "3e-06"]
    assert rows[-1][3:6] == ["–", "–", "–"]  # no epoch followed
    summary = json.loads((shrinking / "summary.json").read_text())
    share = 100 * 6 * 0.25 / summary["train_seconds"]
    assert f"6 reconfigurations took 1.5 s, {share:.2f}% of the run." in page.text


def test_the_timeline_says_it_in_words(shrinking: Path) -> None:
    moments = [item.text for item in page_of(shrinking).one("ol", "moments").all("li")]
    assert any("channels removed" in text and "2 layers gone" in text for text in moments)
    assert any("larger batches 160 images, learning rate × 1.25" in text for text in moments)


def test_an_unfinished_run_and_one_with_fixed_batches(tmp_path: Path) -> None:
    begun = make_shrinking_run(tmp_path / "begun", stop_after=25)
    fixed = make_shrinking_run(tmp_path / "fixed", batch_grows=False)
    page = page_of(begun)
    assert {"Memory per iteration, MB", "Density of each layer, %"} <= set(titles(page))
    assert "now" in figure(page, "Memory per iteration, MB").text
    page = page_of(fixed)
    assert "Images per batch" not in titles(page)
    assert not figure(page, "Memory per iteration, MB").all("line", "reference")


def test_nothing_of_it_for_other_runs(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "clicktrain"), make_run(tmp_path / "dense", method="dense"))
    assert not set(FIGURES) & set(titles(page))
    assert "A network that becomes smaller" not in [h.text for h in page.all("h3")]
    (run,) = read_runs([tmp_path / "dense"])
    assert channel_view(run) is None


def test_when_to_prune(tmp_path: Path) -> None:
    page = page_of(make_pat_run(tmp_path / "pat"))
    drawn = figure(page, "Early pruning indicator")
    assert "the threshold 0.944" in drawn.one("figcaption").text
    assert "Pruning began after epoch 14" in drawn.one("figcaption").text
    upright = [
        line for line in drawn.all("line", "reference") if line.attributes["x1"] == line.attributes["x2"]
    ]
    level = [
        line for line in drawn.all("line", "reference") if line.attributes["y1"] == line.attributes["y2"]
    ]
    assert len(upright) == len(level) == 1
    labels = {t.text: float(t.attributes["x"]) for t in drawn.all("text", "x")}
    scale = (labels["30"] - labels["0"]) / 30
    assert float(upright[0].attributes["x1"]) == pytest.approx(labels["0"] + 14 * scale, abs=0.1)
    assert not any("epi" in item.text for item in page.one("ol", "moments").all("li"))


def test_a_sweep_draws_accuracy_over_cost(tmp_path: Path) -> None:
    runs = [
        make_shrinking_run(tmp_path / f"ratio-{i}", every=every, accuracy=accuracy)
        for i, (every, accuracy) in enumerate([(10, 87.0), (20, 87.5)])
    ]
    for i, (run, ratio) in enumerate(zip(runs, (0.5, 0.7), strict=True)):
        summary = json.loads((run / "summary.json").read_text())
        summary |= {"train_flops_ratio": ratio, "inference_flops_ratio": ratio - 0.2, "seed": i}
        (run / "summary.json").write_text(json.dumps(summary))
    page = page_of(*runs, make_run(tmp_path / "dense", method="dense", accuracy=87.6))
    for title, places in (
        ("Accuracy, %, against training FLOPs", [50, 70, 100]),
        ("Accuracy, %, against inference FLOPs", [30, 50, 100]),
    ):
        drawn = figure(page, title)
        labels = {t.text: float(t.attributes["x"]) for t in drawn.all("text", "x")}
        scale = (labels["100"] - labels["0"]) / 100
        found = sorted((float(c.attributes["cx"]) - labels["0"]) / scale for c in drawn.all("circle"))
        assert found == pytest.approx(places, abs=0.5)
        assert len(drawn.all("line", "reference")) == 1
    assert "FLOPs per image in training, % of dense" in titles(page)


def test_the_price_of_rounded_widths_is_told(tmp_path: Path) -> None:
    folder = make_shrinking_run(tmp_path / "run")
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    number = next(i for i, event in enumerate(events) if event["event"] == "reconfigured")
    removal = events[number]
    removal |= {"round_to": 8, "channels_without_rounding": removal["channels_after"] - 7}
    rows = [{"multiple": 1, "ms": 4.0, "channels": 100}, {"multiple": 8, "ms": 3.0, "channels": 107}]
    widths = {"event": "widths", "step": 312, "epoch": 1.0, "chosen": 8, "rows": rows}
    events.insert(number, widths)
    events.insert(number, {**widths, "chosen": 1})
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    moments = [item.text for item in page_of(folder).one("ol", "moments").all("li")]
    assert any("in 8s: a step takes 75% of the time, for 7.0% more channels" in text for text in moments)
    assert any("no multiple trains faster" in text for text in moments)
    assert any("(7 kept for widths in 8s)" in text for text in moments)
