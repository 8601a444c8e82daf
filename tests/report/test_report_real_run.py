# ruff: noqa: RUF001 (the page has real minus and multiplication signs)
from __future__ import annotations

import json
from pathlib import Path

from html_tree import parse

from clicktrain.report import write_report
from clicktrain.train import RunConfig, resolve_method
from clicktrain.train.fit import fit


def test_a_real_run_is_reported_with_its_own_numbers(tmp_path: Path) -> None:
    data = "synthetic:classes=3,size=8,channels=1,train=160,val=30"
    common = {"model": "resnet8", "width": 0.25, "epochs": 5, "batch_size": 32, "data": data, "threads": 1}
    for method in ("dense", "clicktrain"):
        settings = {"compression": 4.0} if method == "clicktrain" else {}
        fit(RunConfig(method=method, **common), resolve_method(method, **settings), tmp_path / method)
    page = parse(
        write_report([tmp_path / "clicktrain", tmp_path / "dense"], tmp_path / "report.html").read_text(
            "utf-8"
        )
    )
    summary = json.loads((tmp_path / "clicktrain" / "summary.json").read_text())
    dense = json.loads((tmp_path / "dense" / "summary.json").read_text())
    assert page.one("h1").text.startswith(
        f"{summary['compression_ratio']:.1f}× smaller convolutions, {summary['val_accuracy']:.1f}% accuracy "
        f"(dense {dense['val_accuracy']:.1f}%), "
    )
    section = page.all("details", "run")[0]
    assert len(section.one("ul", "pool").all("li")) == 12
    assert [band.attributes["class"].split()[1] for band in section.all("figure")[0].all("rect", "band")] == [
        f"stage-{name}" for name in ("dense", "pool", "finalize", "regularize", "accelerated")
    ]
    assert "pat-other" not in "".join(
        p.attributes["class"] for p in page.all("path") if "class" in p.attributes
    )
    assert section.all("svg", "mask")
