# ruff: noqa: RUF001 (the page has real minus and multiplication signs)
from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from html_tree import Node, parse
from run_folders import POOL_BITS, make_run, resnet_layers

from clicktrain.errors import UserError
from clicktrain.report import write_report

Report = Callable[..., Node]


def titles(page: Node) -> list[str]:
    return [figure.all("h4")[0].text for figure in page.all("figure")]


def headings(page: Node) -> list[str]:
    return [node.text for tag in ("h2", "h3") for node in page.all(tag)]


def table(page: Node, label: str) -> list[list[str]]:
    """Rows of the table with that label, header first."""
    (region,) = [n for n in page.all("div", "scroll") if n.attributes.get("aria-label", "") == label]
    rows = region.all("tr")
    return [[c.text for c in row.children if isinstance(c, Node) and c.tag in ("td", "th")] for row in rows]


def test_the_headline_tells_what_was_reached(report: Report, runs: dict[str, Path]) -> None:
    page = report("dense", "8x")
    summary = json.loads((runs["8x"] / "summary.json").read_text())
    saved = 100 * (1 - summary["train_flops_ratio"])
    expected = (
        f"{summary['compression_ratio']:.1f}× smaller convolutions, 87.1% accuracy (dense 87.6%), "
        f"{saved:.0f}% of training FLOPs saved"
    )
    assert page.one("h1").text == expected
    assert page.one("head").one("title").text.startswith(expected)
    tiles = {tile.one("dt").text: [dd.text for dd in tile.all("dd")] for tile in page.all("div", "tile")}
    assert tiles["accuracy"] == ["87.1%", "−0.5 points to dense"]
    assert tiles["inference FLOPs"][0] == f"{100 * summary['inference_flops_ratio']:.0f}%"
    assert tiles["compression"][1] == "asked: 8.0×"
    size = (runs["8x"] / "packed.safetensors").stat().st_size
    assert tiles["packed file"][0] == f"{size / 1000:.0f} kB"


def test_the_table_compares_all_runs_with_the_dense_one(report: Report) -> None:
    rows = table(report("8x", "4x", "dense", "fixed"), "Table of the runs")
    by_name = {re.match(r"(dense|clicktrain-.x|fixed-8x)", row[0])[1]: row for row in rows[1:]}
    assert by_name["dense"][4] == "baseline"
    assert by_name["clicktrain-4x"][2:5] == ["87.40", "87.40", "−0.2"]
    assert by_name["clicktrain-8x"][2:5] == ["87.10", "87.10", "−0.5"]
    assert by_name["fixed-8x"][2:5] == ["85.93", "85.93", "−1.7"]
    assert by_name["clicktrain-8x"][1].startswith("8.0× →")
    assert "ClickTrain · seed 0" in by_name["clicktrain-8x"][0]
    assert by_name["clicktrain-8x"][10] == "30"
    assert by_name["clicktrain-8x"][11] == "AMD EPYC 9R14 96-Core Processor"
    assert by_name["dense"][5:8] == ["100%", "–", "100%"]  # a folder without the nominal count


def test_every_section_is_there(report: Report) -> None:
    page = report("dense", "8x")
    assert {
        "The runs side by side",
        "clicktrain-8x",
        "dense",
        "Course of training",
        "What was decided when",
        "Pattern pool for 3×3 kernels",
        "Patterns chosen, layer by layer (3×3 kernels)",
        "What each layer kept",
        "Masks",
        "Words",
    } <= set(headings(page))
    assert titles(page.all("details", "run")[0])[:6] == [
        "Loss",
        "Accuracy, %",
        "Sparsity, %",
        "FLOPs per epoch, % of dense",
        "Time per epoch, s",
        "Learning rate",
    ]
    for title in ("Accuracy, %, against compression", "Validation accuracy, %", "Training loss", "Stages"):
        assert title in titles(page)


def test_stages_are_bands_as_wide_as_they_lasted(report: Report) -> None:
    loss = report("8x").all("figure")[0]
    bands = loss.all("rect", "band")
    widths = [float(band.attributes["width"]) for band in bands]
    assert [band.attributes["class"].split()[1] for band in bands] == [
        f"stage-{name}" for name in ("dense", "pool", "finalize", "regularize", "accelerated")
    ]
    assert [width / sum(widths) for width in widths] == pytest.approx([0.3, 0.05, 0.05, 0.1, 0.5], abs=1e-3)
    assert [mark.text for mark in loss.all("text", "band-mark")] == ["1", "2", "3", "4", "5"]


def test_curves_end_at_the_last_value(report: Report, runs: dict[str, Path]) -> None:
    figure = next(f for f in report("8x").all("figure") if f.all("h4")[0].text == "Accuracy, %")
    dot = figure.all("circle")[-1]
    labels = {t.text: float(t.attributes["y"]) - 4 for t in figure.all("text", "y")}
    high, low = labels["100"], labels["80"]
    value = 100 - 20 * (float(dot.attributes["cy"]) - high) / (low - high)
    assert value == pytest.approx(87.1, abs=0.05)
    last = json.loads((runs["8x"] / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"ends at {last['val_accuracy']:.1f}%" in figure.one("figcaption").text


def test_the_pool_is_drawn_with_its_scores(report: Report) -> None:
    pool = report("8x").one("ul", "pool")
    items = pool.all("li")
    assert len(items) == 12
    for item, bits in zip(items, POOL_BITS, strict=True):
        cells = item.one("svg").all("rect")
        assert len(cells) == 9
        kept = [i for i, cell in enumerate(cells) if "on" in cell.attributes["class"].split()]
        assert kept == [i for i in range(9) if bits >> i & 1]
    assert "1.90 M" in items[0].text
    assert "362 k" in items[-1].text
    assert items[0].one("svg").attributes["aria-label"] == "pattern 1: ##./##./..."


def test_a_given_pool_has_no_scores(report: Report) -> None:
    page = report("fixed")
    assert "did not have to compete" in page.text
    assert not page.one("ul", "pool").all("b")


def test_pattern_use_per_layer_adds_up(report: Report, runs: dict[str, Path]) -> None:
    rows = table(report("8x"), "Patterns chosen per layer")
    events = [json.loads(line) for line in (runs["8x"] / "events.jsonl").read_text().splitlines()]
    layers = next(e for e in events if e["event"] == "finalised")["layers"]
    with_patterns = {layer["name"]: layer["pattern_counts"] for layer in layers if layer["pattern_counts"]}
    body = {row[0]: row[1:] for row in rows[1:]}
    assert set(body) == {*with_patterns, "all layers"}
    for name, counts in with_patterns.items():
        assert body[name][-1] == f"{sum(counts):,}"
        for cell, count in zip(body[name][:-1], counts, strict=True):
            share = 100 * count / sum(counts)
            assert cell == ("0" if count == 0 else "<1" if share < 0.5 else str(round(share)))


def test_densities_per_layer(report: Report, runs: dict[str, Path]) -> None:
    rows = table(report("8x"), "Densities and FLOPs per layer")
    summary = json.loads((runs["8x"] / "summary.json").read_text())
    assert len(rows) == 1 + len(summary["layers"])
    by_name = {row[0]: row for row in rows[1:]}
    layer = next(item for item in summary["layers"] if item["name"] == "layer3.0.conv1")
    kernels = layer["nnz_per_filter"] / 4 / 32
    assert by_name["layer3.0.conv1"][1] == "64×32×3×3"
    assert by_name["layer3.0.conv1"][2] == f"{100 * kernels:.1f}%"
    assert by_name["layer3.0.conv1"][3] == f"{100 * layer['density']:.1f}%"
    assert by_name["conv1"][2:4] == ["100.0%", "100.0%"]
    assert by_name["fc"][2] == "–"


def test_masks_of_telling_layers_are_drawn(report: Report) -> None:
    page = report("8x")
    figures = [f for f in page.all("figure") if f.all("svg", "mask")]
    assert 2 <= len(figures) <= 3
    assert figures[0].one("h4").text == "layer3.0.conv2"
    assert figures[0].one("figcaption").text.startswith("The largest pruned layer: ")
    for figure in figures:
        assert figure.one("svg", "corner").all("path")


def test_a_dense_run_has_no_pruning_sections(report: Report) -> None:
    page = report("dense")
    assert page.one("h1").text == "87.6% accuracy, nothing pruned"
    for absent in ("Pattern pool", "Masks", "What each layer kept", "What was decided", "Sparsity, %"):
        assert not any(absent in text for text in headings(page) + titles(page))
    assert titles(page) == [
        "Loss",
        "Accuracy, %",
        "FLOPs per epoch, % of dense",
        "Time per epoch, s",
        "Learning rate",
    ]


def test_an_unfinished_run_is_shown_as_unfinished(report: Report) -> None:
    page = report("dense", "running")
    assert page.one("h1").text.startswith("Unfinished: epoch 23 of 60, ")
    row = table(page, "Table of the runs")[2]
    assert "unfinished: 23 of 60" in row[0]
    assert row[4] == "–"
    section = page.all("details", "run")[0]
    assert section.one("h2").text == "running"
    assert not section.all("svg", "mask")
    assert section.all("ul", "pool")
    assert [b.attributes["class"] for b in section.all("figure")[0].all("rect", "band")] == [
        "band stage-dense",
        "band stage-pool",
        "band stage-finalize",
    ]


def test_a_run_without_a_finished_epoch_is_shown(report: Report) -> None:
    page = report("begun")
    assert page.one("h1").text == "Unfinished: epoch 0 of 60"
    assert "No epoch is finished yet." in page.text
    assert not page.all("figure")


def test_settings_and_versions_are_there(report: Report) -> None:
    page = report("dense", "fixed")
    facts = {d.one("dt").text: d.one("dd").text for dl in page.all("dl", "facts") for d in dl.all("div")}
    assert facts["schedule"] == "onecycle"
    assert facts["milestones"] == "[0.5, 0.75]"
    assert facts["image_size"] == "–"
    assert facts["version of torch"] == "2.13.0+cpu"
    assert facts["CPU"] == "AMD EPYC 9R14 96-Core Processor"
    assert facts["classes"].startswith("10: airplane, automobile")
    differing = {row[0] for row in table(page, "Settings in which the runs differ")[1:]}
    assert differing == {"method"}
    both = report("8x", "fixed")
    assert {row[0] for row in table(both, "Settings in which the runs differ")[1:]} == {"pool"}


def test_the_page_is_self_contained(runs: dict[str, Path], tmp_path: Path) -> None:
    text = write_report(list(runs.values()), tmp_path / "all.html").read_text(encoding="utf-8")
    page = parse(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe|<img|data:|javascript:", text)
    for node in page.all():
        assert not {"src", "srcset", "onload", "onclick"} & set(node.attributes)
        assert node.attributes.get("href", "#").startswith("#")
    assert len(text) < 2_000_000


def test_links_names_and_labels(report: Report) -> None:
    page = report("dense", "8x", "running", "fixed")
    ids = [node.attributes["id"] for node in page.all() if "id" in node.attributes]
    assert len(set(ids)) == len(ids)
    links = [node.attributes["href"][1:] for node in page.all("a")]
    assert links
    assert set(links) <= set(ids)
    for picture in page.all("svg"):
        assert picture.attributes.get("aria-hidden") == "true" or (
            picture.attributes["role"] == "img" and picture.attributes["aria-label"]
        )
    assert all(cell.attributes.get("scope") in ("col", "row") for cell in page.all("th"))
    assert page.one("html").attributes["lang"] == "en"
    for figure in page.all("figure"):
        assert figure.one("h4").text
        assert figure.one("figcaption").text


def test_with_many_runs_only_the_headlines_section_is_unfolded(report: Report) -> None:
    sections = report("dense", "4x", "8x", "fixed").all("details", "run")
    assert ["open" in section.attributes for section in sections] == [True, False, False, False]
    assert sections[0].one("h2").text == "clicktrain-8x"
    assert sections[-1].one("h2").text == "dense"


def test_the_same_folders_give_the_same_bytes(runs: dict[str, Path], tmp_path: Path) -> None:
    folders = [runs[name] for name in ("dense", "8x", "running")]
    first = write_report(folders, tmp_path / "first.html")
    second = write_report(folders, tmp_path / "deeper" / "second.html")
    assert second == tmp_path / "deeper" / "second.html"
    assert first.read_bytes() == second.read_bytes()
    assert list(tmp_path.glob("*.tmp")) == []


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"


def test_hostile_names_are_only_text(tmp_path: Path) -> None:
    layers = resnet_layers(blocks=1)
    layers[1]["name"] = layers[1]["name"] + HOSTILE
    run = make_run(
        tmp_path / "run <b>bold",
        layers=layers,
        classes=["cat", HOSTILE],
        settings={"model": HOSTILE, "note": HOSTILE, HOSTILE: 1},
        epochs=10,
    )
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": HOSTILE, "step": 1, "epoch": 9.0, HOSTILE: HOSTILE}) + "\n")
    dense = make_run(
        tmp_path / "dense <img src=x onerror=alert(3)>", method="dense", layers=layers, epochs=10
    )
    text = write_report([run, dense], tmp_path / "report.html").read_text(encoding="utf-8")
    page = parse(text)
    assert not page.all("script") + page.all("img")
    assert "<b>bold" not in text
    assert any("onerror" in name.text for name in page.all("text", "name"))
    assert not any(name.startswith("on") for node in page.all() for name in node.attributes)
    first = page.all("details", "run")[0]
    facts = {d.one("dt").text: d.one("dd").text for dl in first.all("dl", "facts") for d in dl.all("div")}
    assert facts["classes"] == f"2: cat, {HOSTILE}"
    assert facts["note"] == HOSTILE
    assert facts[HOSTILE] == "1"
    assert any(row[0] == layers[1]["name"] for row in table(page, "Densities and FLOPs per layer"))
    assert page.all("h2")[1].text == "run <b>bold"


def _damage(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "config.yaml").unlink(),
            "is not the folder of a run: it has no config.yaml",
        ),
        (_damage("config.yaml", b"a: [1"), "config.yaml is not valid YAML (line 1)"),
        (_damage("config.yaml", b"- 1\n"), "its config.yaml holds no settings"),
        (_damage("config.yaml", b"# clicktrain run folder, format 99\nmodel: x\n"), "update clicktrain"),
        (_damage("metrics.jsonl", b"{}\nnonsense\n"), "metrics.jsonl is damaged: a line of it is not JSON"),
        (_damage("events.jsonl", b"[1]\n"), "events.jsonl is damaged: a line of it is not a record"),
        (_damage("summary.json", b"{"), "summary.json is damaged: it is not JSON"),
        (_damage("summary.json", b'{"format_version": 99}'), "update clicktrain"),
        (_damage("model.safetensors", b"pickle"), "model.safetensors is damaged"),
    ],
)
def test_a_folder_that_is_no_run_is_told_in_one_sentence(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    run = make_run(tmp_path / "run", epochs=4, layers=resnet_layers(blocks=1))
    damage(run)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        write_report([run], tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_wrong_paths(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        write_report([tmp_path / "nothing"], tmp_path / "report.html")
    with pytest.raises(UserError, match="at least one run folder"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(UserError, match="is given twice"):
        write_report([runs["8x"], runs["8x"] / ".." / runs["8x"].name], tmp_path / "report.html")
    with pytest.raises(UserError, match="is a folder: give the name of a file"):
        write_report([runs["8x"]], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_report([runs["8x"]], tmp_path / "file" / "report.html")


def test_an_unfinished_last_line_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", epochs=10, stop_after=3, layers=resnet_layers(blocks=1))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "train_lo')
    page = parse(write_report([run], tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.one("h1").text.startswith("Unfinished: epoch 3 of 10")


def test_epochs_without_evaluation_and_numbers_that_are_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", epochs=10, layers=resnet_layers(blocks=1))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        if i % 3:
            line["val_accuracy"] = line["val_loss"] = None
    lines[4]["train_loss"] = float("nan")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = parse(write_report([run], tmp_path / "report.html").read_text(encoding="utf-8"))
    rows = table(page, "Numbers of each epoch")
    assert rows[2][5] == "–"
    assert rows[5][2] == "–"
    assert "nan" not in page.text.lower()
    assert all("nan" not in path.attributes["d"] for path in page.all("path"))
