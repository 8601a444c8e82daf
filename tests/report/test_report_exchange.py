"""Figures of the exchange on many GPUs: from the sizes that a run has recorded."""

from __future__ import annotations

import json
import re
from pathlib import Path

from html_tree import Node, parse
from run_folders import make_run

from clicktrain.report import write_report


def page_of(folder: Path, *, grows: bool = False) -> Node:
    """A run whose gradients shrink to a quarter in its last third, with larger batches if asked for."""
    make_run(folder, compression=4, accuracy=87.0)
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        late = line["epoch"] > 20
        batch, size = (256 if grows and late else 128), (1_000_000 if late else 4_000_000)
        line |= {
            "batch_size": batch,
            "gradient_bytes": size,
            "gradient_bytes_epoch": size * (40_000 // batch),
        }
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return parse(write_report([folder], folder.parent / "report.html").read_text(encoding="utf-8"))


def figure(page: Node, title: str) -> Node:
    (found,) = [one for one in page.all("figure") if one.all("h4")[0].text == title]
    return found


def tips(one: Node) -> dict[str, dict[str, float]]:
    """Tooltips: place on the axis -> the name and value of each line."""
    found = {}
    for tip in one.all("rect", "tip"):
        place, rest = re.fullmatch(r"((?:epoch|GPUs) \d+) (.*)", tip.all("title")[0].text).groups()
        found[place] = {name: float(value) for name, value in re.findall(r"([A-Za-z ]+): ([\d.]+) ?", rest)}
    return found


def test_bytes_of_a_step_over_epochs(tmp_path: Path) -> None:
    shown = figure(page_of(tmp_path / "run"), "Exchange on 128 GPUs, % of dense")
    assert tips(shown)["epoch 20"] == {"a step": 100}
    assert tips(shown)["epoch 21"] == {"a step": 25}
    assert "50% saved in a step, on average. Projected." in shown.one("figcaption").text


def test_larger_batches_have_a_line_of_their_own(tmp_path: Path) -> None:
    shown = figure(page_of(tmp_path / "run", grows=True), "Exchange on 128 GPUs, % of dense")
    assert tips(shown)["epoch 20"] == {"a step": 100, "an epoch": 100}
    assert tips(shown)["epoch 21"] == {"a step": 25, "an epoch": 12.5}
    assert "in the run with its larger batches" in shown.one("figcaption").text


def test_what_several_processes_counted(tmp_path: Path) -> None:
    make_run(tmp_path / "run", compression=4, accuracy=87.0)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line |= {"exchange_steps": 10, "exchange_bytes": 5_000_000 if line["epoch"] > 20 else 20_000_000}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (tmp_path / "run" / "summary.json").write_text(json.dumps({**summary, "exchange_ratio": 0.5}))
    page = parse(write_report([tmp_path / "run"], tmp_path / "report.html").read_text(encoding="utf-8"))
    shown = figure(page, "Exchanged in a step, MB")
    assert tips(shown)["epoch 20"] == {"MB": 2}
    assert tips(shown)["epoch 21"] == {"MB": 0.5}
    caption = shown.one("figcaption").text
    assert "2 MB at first, 0.5 MB at the end. All gradients of the run are 50% of those of dense" in caption
    titles = [one.all("h4")[0].text for one in page_of(tmp_path / "alone").all("figure")]
    assert "Exchanged in a step, MB" not in titles


def test_times_by_number_of_gpus(tmp_path: Path) -> None:
    page = page_of(tmp_path / "run")
    exchange = tips(figure(page, "Exchange of a step, ms"))
    assert list(exchange) == ["GPUs 4", "GPUs 8", "GPUs 16"]
    for values in exchange.values():
        assert 0.2 * values["dense"] < values["this run"] < 0.5 * values["dense"]
    titles = [one.all("h4")[0].text for one in page.all("figure")]
    (training,) = [title for title in titles if title.startswith("Training on several GPUs")]
    times = list(tips(figure(page, training)).values())
    assert [values["dense"] for values in times] == sorted((v["dense"] for v in times), reverse=True)
    assert all(values["this run"] < values["dense"] for values in times)


def test_dense_runs_and_old_folders_have_none(tmp_path: Path) -> None:
    for name, method in (("dense", "dense"), ("old", "clicktrain")):
        make_run(tmp_path / name, method=method, accuracy=87.0)
        page = parse(write_report([tmp_path / name], tmp_path / "page.html").read_text(encoding="utf-8"))
        titles = [one.all("h4")[0].text for one in page.all("figure")]
        assert not [title for title in titles if "GPUs" in title or "Exchange" in title]
