"""`scripts/gpu.py` without a GPU: what it measures is built and checked dry, resumed, and never made up."""

from __future__ import annotations

import importlib.util
import json
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from clicktrain.bench.gpu_page import page
from clicktrain.errors import UserError
from clicktrain.train import from_dict


@pytest.fixture(scope="module")
def script(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", repository / "scripts/gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("triton") is None:
        pytest.skip("needs Triton: pip install triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_the_table_of_structures(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location("structures", repository / "scripts/gpu_structures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = dict(module.structures([16, 64]))
    assert [*names] == [
        "dense", "nothing shared", "kernels, 16 filters", "kernels, 64 filters", "channels, 16 filters",
        "channels, 64 filters", "similar, 16 filters", "similar, 64 filters",
    ]  # fmt: skip
    for changes in names.values():
        settings = module.settings_of(
            changes, 2, ["epochs=3", "data=synthetic:classes=4,size=8,train=64,val=16"]
        )
        config, method = from_dict(settings)
        assert (config.seed, config.epochs, config.width) == (2, 3, 4.0)
        assert getattr(method, "group", 1) == changes.get("group", 1)
    rows = [
        {"structure": name, "seed": seed, "val_accuracy": value + seed}
        for name, value in (("nothing shared", 80.0), ("kernels, 16 filters", 78.5))
        for seed in range(3)
    ]
    assert module.table(rows).splitlines()[2:] == [
        "| nothing shared | 81.00 | 80.00 to 82.00 (3) | +0.00 |",
        "| kernels, 16 filters | 79.50 | 78.50 to 80.50 (3) | -1.50 |",
    ]


def numbers(value: Any, under: str = "") -> list[str]:
    """Places of figures that a clock would give."""
    if isinstance(value, dict):
        return [one for key, inner in value.items() for one in numbers(inner, key)]
    if isinstance(value, list):
        return [one for inner in value for one in numbers(inner, under)]
    timed = under in ("ratio", "seconds", "ms", "val_accuracy") and isinstance(value, (int, float))
    return [under] if timed else []


@pytest.mark.usefixtures("_interpreter")
def test_dry_pieces_are_checked_resumed_and_have_no_figures(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dry = ["--dry", "--out", str(tmp_path)]
    for piece in ("conversion", "norms", "wide-10x-64x64-bf16", "resnet50-1x1"):
        assert script.main([*dry, "--only", piece]) == 0, capsys.readouterr().out
        document = json.loads((tmp_path / f"{piece}.json").read_text(encoding="utf-8"))
        assert document["rows"]
        assert document["dry"]
        assert numbers(document["rows"]) == []
    assert "checked" in capsys.readouterr().out
    assert script.main([*dry, "--only", "conversion"]) == 0
    assert capsys.readouterr().out == "", "what is done is not done again"
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert text.count("none was timed") == 4
    with pytest.raises(UserError, match="is of a dry run: give another --out"):
        script.run("conversion", {"x": list}, tmp_path / "conversion.json", lambda: False)


@pytest.mark.long
@pytest.mark.usefixtures("_interpreter")
@pytest.mark.filterwarnings("ignore:the step runs without a CUDA graph")
def test_dry_networks_and_runs(script: ModuleType, tmp_path: Path) -> None:
    for piece in ("steps", "accuracy"):
        assert script.main(["--dry", "--out", str(tmp_path), "--only", piece]) == 0
        document = json.loads((tmp_path / f"{piece}.json").read_text(encoding="utf-8"))
        assert document["failed"] == {}
        assert numbers(document["rows"]) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    script: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert script.main(["--out", str(tmp_path / "new")]) == 2
    assert "this needs an NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_case_that_fails_does_not_stop_the_others_and_time_does(script: ModuleType, tmp_path: Path) -> None:
    path, left = tmp_path / "piece.json", iter([False, False, True])

    def wrong() -> list[dict[str, Any]]:
        raise ValueError("no such kernel")

    jobs = {"one": wrong, "two": lambda: [{"ms": {}, "ratio": None}], "three": lambda: [{"ratio": None}]}
    assert not script.run("piece", jobs, path, lambda: next(left), True)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert [*document["rows"]] == ["two"]
    assert "no such kernel" in document["failed"]["one"]
    jobs["one"] = lambda: [{"ratio": None}]
    assert script.run("piece", jobs, path, lambda: False, True)
    assert json.loads(path.read_text(encoding="utf-8"))["failed"] == {}


def test_every_piece_has_cases_and_the_most_valuable_are_first(script: ModuleType, tmp_path: Path) -> None:
    names = {dry: [*script.pieces("synthetic", tmp_path, dry, lambda: False)] for dry in (False, True)}
    assert names[True] == names[False]
    assert names[False][:3] == ["checks", "wide-10x-64x1-bf16", "steps"]
    assert {"conversion", "norms", "accuracy", "resnet50-1x1"} < set(names[False])
    for dry in (False, True):
        assert all(script.pieces("synthetic", tmp_path, dry, lambda: False).values())


def test_the_page_of_figures(tmp_path: Path) -> None:
    shape = {"channels": 256, "filters": 256, "height": 8, "width": 8, "batch": 256}
    case = {"shape": shape, "compression": 10.0, "precision": "bf16"}
    layer = {
        "case": case, "phase": "forward", "dense": {"nchw": 0.5, "channels_last": 0.25},
        "sparse": {"a": 0.2, "b": 0.125}, "ratio": 2.0, "predicted_ratio": 2.5,
    }  # fmt: skip
    run = {"case": {"method": "dense"}, "val_accuracy": 91.25, "seconds": 30.0, "train_flops_ratio": 1.0,
           "density": 1.0}  # fmt: skip
    step = {"case": {"model": "resnet18"}, "ms": {"dense": 8.0, "sparse": 4.0}, "ratio": 2.0}
    for name, row in (("layers", layer), ("runs", run), ("steps", step)):
        document = {"machine": {"gpu": "H200"}, "rows": {"x": [row]}, "failed": {"y": "Traceback\nOops: z"}}
        (tmp_path / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    lines = page(tmp_path).splitlines()
    assert (
        "| 256x256x8, compression 10.0, precision bf16 | forward | 0.2500 | 0.1250 | `b` | 2.00 | 2.50 |"
        in lines
    )
    assert "| dense | 91.25 | 30.0 | 1.000 | 1.0000 |" in lines
    assert "| model resnet18 | 8.000 | 4.000 | 2.00 |" in lines
    assert lines.count("- failed: y: Oops: z") == 3
    assert lines.count("- gpu H200") == 1
