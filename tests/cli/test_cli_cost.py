"""``clicktrain cost``: tables for people, all of it as JSON, and mistakes in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runs import Outcome, call

from clicktrain.cluster import Link, MeasuredRow
from clicktrain.cluster.fit import modeled_seconds


@pytest.mark.long
def test_a_run_on_more_and_more_gpus(finished: tuple[Path, Outcome], tmp_path: Path) -> None:
    folder, out = finished[0], tmp_path / "cost.json"
    done = call(
        "cost", folder, "--gpus", "2", "128", "1024", "--link", "ethernet-10g", "--by-epoch", "--json", out
    )
    assert done.code == 0, done.err
    assert "128 machines by one ethernet-10g (10 Gbit/s, 30 us)" in done.out
    assert "by epoch on 1024 GPUs" in done.out
    (run,) = json.loads(out.read_text())["runs"]
    assert (run["run"], run["method"]) == (str(folder), "clicktrain")
    assert [cluster["gpus"] for cluster in run["clusters"]] == [2, 128, 1024]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for cluster in run["clusters"]:
        assert len(cluster["epochs"]) == len(lines) == 4
        first, last = cluster["epochs"][0], cluster["epochs"][-1]
        share = lines[-1]["gradient_bytes"] / lines[0]["gradient_bytes"]
        assert last["bytes_step"] / first["bytes_step"] == pytest.approx(share)
        assert share < 0.5
        assert 0 < last["exposed_ms"] <= last["exchange_ms"] * (1 + 1e-9)
        assert last["exchange_ms"] < last["dense_exchange_ms"]
        assert cluster["seconds"] == pytest.approx(sum(epoch["seconds"] for epoch in cluster["epochs"]))
    assert (
        run["clusters"][0]["epochs"][0]["bytes_step"] == lines[0]["gradient_bytes"]
    )  # of two GPUs: a half, twice
    fewer, more = (run["clusters"][number]["epochs"][-1]["exchange_ms"] for number in (1, 2))
    assert fewer < more


def write_rows(path: Path) -> Path:
    rows = []
    for link, truth in (("1 Gbit/s", Link("", 1.2e8, 1e-4)), ("0.1 Gbit/s", Link("", 1.2e7, 1e-4))):
        for what, processes, size in (("dense", 2, 4e6), ("10x", 2, 5e5), ("dense", 4, 4e6), ("10x", 4, 5e5)):
            row = MeasuredRow(what, processes, link, size, 1.0)
            rows.append({"what": what, "processes": processes, "link": link, "bytes_per_step": size,
                         "exchange_ms": 1e3 * modeled_seconds(row, truth) * (1.1 if what == "10x" else 1.0),
                         "step_ms": 100.0})  # fmt: skip
    path.write_text(json.dumps({"rows": rows}))
    return path


def test_the_model_is_checked_against_measured_rows(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json")
    done = call("cost", "--check", rows, "--json", tmp_path / "check.json")
    assert done.code == 0, done.err
    assert done.out.count("error: median") == 2
    slow = json.loads((tmp_path / "check.json").read_text())["check"][1]
    assert slow["link"] == "0.1 Gbit/s"
    assert slow["gbit_per_second"] == pytest.approx(0.096, rel=0.1)
    assert 0 < slow["largest_error"] < 0.2
    assert len(slow["rows"]) == 4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "RUNS is missing: write 'clicktrain cost RUN... [--gpus N ...] [--link NAME]'"),
        (["none"], "there is no folder none"),
        (["--check", "none.json"], "none.json cannot be read (No such file or directory)"),
        (
            ["x", "--json", "no/file.json"],
            "--json no/file.json: there is no folder no",
        ),
        (["x", "--tflops", "0"], "tflops is 0.0: must be above 0"),
        (["x", "--gpu", "3"], "unknown flag --gpu: did you mean --gpus?"),
    ],
)
def test_mistakes(words: list[str], sentence: str, place: Path) -> None:
    done = call("cost", *words)
    assert done.code == 2
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1


def test_wrong_links_and_numbers(place: Path) -> None:
    (place / "run").mkdir()
    (place / "run" / "config.yaml").write_text("method: dense\n")
    for words, sentence in (
        (["--link", "ethernet-10gb"], "link 'ethernet-10gb' is unknown: did you mean ethernet-10g?"),
        (["--gpus", "20"], "20 GPUs do not fill machines of 8"),
        ([], "run: the run has no finished epoch with the bytes of its gradients"),
    ):
        done = call("cost", "run", *words)
        assert (done.code, len(done.err.splitlines())) == (2, 1)
        assert sentence in done.err
