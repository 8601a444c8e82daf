"""``clicktrain bench``: what it prints and writes, and its mistakes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from cli_runs import call, files_below
from rich.console import Console

from clicktrain.commands.bench import BENCHMARKS, runs
from clicktrain.kernels.native import toolchain

needs_compiler = pytest.mark.skipif(toolchain() is None, reason="needs a C compiler")
ONE = ("--rounds", "1", "--threads", "1")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_help(name: str) -> None:
    outcome = call("bench", name, "--help")
    assert outcome.code == 0
    assert outcome.out.startswith(f"usage: clicktrain bench {name} [--flag value ...]")
    assert "--json FILE" in outcome.out
    assert name in call("bench", "--help").out


@needs_compiler
def test_conv(place: Path) -> None:
    flags = ("--shapes", "8,4,4", "--compression", "4", "--group", "1", "2", "--no-tune", "--json", "it.json")
    outcome = call("bench", "conv", *flags, *ONE)
    assert outcome.code == 0, outcome.err
    result = json.loads((place / "it.json").read_text())
    assert result["machine"].keys() >= {
        "cpu", "threads", "isa", "compiler", "versions", "peak_gflops", "l1_read_gbs", "l2_read_gbs",
    }  # fmt: skip
    assert result["machine"]["threads"] == 1
    assert result["settings"]["group"] == [1, 2]
    assert len(result["rows"]) == 6
    for row in result["rows"]:
        assert row["shape"] == [8, 8, 4, 4, 4]
        assert row["phase"] in ("forward", "dgrad", "wgrad")
        assert row.keys() >= {
            "compression", "group", "dense_ms", "dense_name", "dense_bf16_ms", "sparse_ms", "ratio",
            "ratio_bf16", "fraction_of_peak", "tiling", "multiply_adds_ms", "memory_ms",
        }  # fmt: skip
        assert row["bound"] == pytest.approx(row["dense_ms"] / (row["multiply_adds_ms"] + row["memory_ms"]))
        assert row["tiling"].keys() >= {"tile", "region", "filters_per_tile"}
    assert result["geomean"]["4x G=1 forward"] == pytest.approx(result["rows"][0]["ratio"])
    assert result["geomean_bf16"].keys() == result["geomean_bound"].keys() == result["geomean"].keys()
    text = " ".join(outcome.out.split())
    assert "8,8,4,4,4" in text
    assert "4x G=2 wgrad" in text
    assert "blocked already" in text
    assert f"on {result['machine']['cpu']}, 1 threads" in text


@pytest.mark.long
@needs_compiler
def test_runs(place: Path) -> None:
    for name, flags in (
        (
            "channels",
            ("--method", "prunetrain", "--coefficient", "0.04", "--interval", "1", "--scheme", "gating"),
        ),
        ("masks", ("--method", "campfire", "--sparsity", "0.8", "--era", "0", "1")),
    ):
        run = call("train", "--model", "resnet8", "--width", "0.25", "--epochs", "2", "--out", name, *flags,
                   "--operators", "reference", "--quiet", "--threads", "1")  # fmt: skip
        assert run.code == 0, run.err
    outcome = call(
        "bench", "runs", "--runs", "channels", "masks", "--batch-size", "4", "--by-layer", "true", "--json",
        "it.json", *ONE,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    result = json.loads((place / "it.json").read_text())
    rows = result["rows"]
    tables = result["by_layer"]
    assert [(table["run"], table["what"]) for table in tables] == [(row["run"], row["what"]) for row in rows]
    for table in tables:
        assert table.keys() == {
            "run", "method", "what", "batch_size", "dense_name", "pruned_name", "layers", "dense_ms",
            "pruned_ms", "flops_ratio", "dense_rest_ms", "pruned_rest_ms", "rest_share_of_saving",
            "rest_excess_ms",
        }  # fmt: skip
        for layer in table["layers"]:
            assert layer.keys() == {
                "layer", "kind", "dense_shape", "pruned_shape", "dense_input", "pruned_input", "dense_flops",
                "pruned_flops", "flops_share", "dense_ms", "pruned_ms", "time_share", "share_of_saving",
                "excess_ms", "note", "gates", "gate_ms",
            }  # fmt: skip
    text = " ".join(outcome.out.split())
    assert "channels: training step, batch 4, layer by layer" in text
    assert "A layer is timed alone, everything else is the whole less its layers." in text
    assert "Side by side: outputs x inputs of a layer, ms" in text
    gated = [layer for table in tables for layer in table["layers"] if layer["gates"]]
    assert ("what of pruned ms the select in front" in text) == bool(gated)
    assert [(row["run"], row["what"]) for row in rows] == [
        ("channels", "inference"), ("channels", "training step"),
        ("masks", "inference"), ("masks", "training step"),
    ]  # fmt: skip
    summary = json.loads((place / "masks" / "summary.json").read_text())
    assert rows[2]["flops_ratio"] == pytest.approx(summary["inference_flops_ratio"])
    for row in rows:
        assert row["ratio"] == pytest.approx(row["dense_ms"] / row["pruned_ms"])
        assert 0 < row["flops_ratio"] < 1
    dense = call("train", "--model", "resnet8", "--width", "0.25", "--epochs", "1", "--out", "dense",
                 "--method", "dense", "--quiet", "--threads", "1")  # fmt: skip
    assert dense.code == 0, dense.err
    wrong = call("bench", "runs", "--runs", "channels", "dense", "--by-layer", *ONE)
    assert wrong.code == 2
    assert "nothing was pruned in dense (method dense): name runs that removed" in " ".join(wrong.err.split())
    nothing = call("bench", "runs")
    assert nothing.code == 2
    assert "name finished runs" in nothing.err


def test_pack(place: Path) -> None:
    flags = ("--filters", "8", "--channels", "16", "--sparsity", "0.75", "--json", "it.json")
    outcome = call("bench", "pack", *flags, *ONE)
    assert outcome.code == 0, outcome.err
    (row,) = json.loads((place / "it.json").read_text())["rows"]
    assert row["case"] == "8x144"
    assert row.keys() >= {"density", "pack_ms", "csr_ms", "masked_select_ms", "ratio"}
    assert "8x144" in outcome.out


def test_step(place: Path) -> None:
    flags = ("--model", "resnet20", "--batch-size", "2", "--image-size", "8", "--compression", "4")
    flags += ("--rule", "sparse")
    outcome = call(
        "bench", "step", *flags, "--no-compile", "--no-memory", *ONE, "--json", str(place / "it.json")
    )
    assert outcome.code == 0, outcome.err
    (row,) = json.loads((place / "it.json").read_text())["rows"]
    assert row.keys() >= {
        "model", "compression", "group", "dense_fp32_ms", "dense_fp32_name", "dense_bf16_ms",
        "dense_bf16_name", "sparse_ms", "ratio_fp32", "ratio_bf16", "dense_memory_mb", "sparse_memory_mb",
    }  # fmt: skip
    assert "resnet20, batch 2, 8 pixels, median of 1 rounds" in outcome.out


def test_stages(place: Path) -> None:
    flags = (
        "--model",
        "resnet20",
        "--batch-size",
        "2",
        "--image-size",
        "8",
        "--steps",
        "3",
        "--threads",
        "1",
    )
    outcome = call("bench", "stages", *flags, "--json", "it.json")
    assert outcome.code == 0, outcome.err
    result = json.loads((place / "it.json").read_text())
    assert [row["stage"] for row in result["rows"]][:2] == ["dense", "pool"]
    assert result["settings"]["steps"] == 3
    assert "preset default" in outcome.out


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("", "WHAT is missing: write 'clicktrain bench WHAT [--flag value ...]', WHAT one of stages, conv"),
        ("--threads 1", "WHAT is missing"),
        ("conf", "there is no benchmark 'conf': did you mean 'conv'?"),
        ("everything", "there is no benchmark 'everything': use one of stages, conv, pack, step"),
        ("conv pack", "'pack' is out of place: write 'clicktrain bench conv [--flag value ...]'"),
        ("conv --shape 64,32,64", "unknown flag --shape: did you mean --shapes?"),
        ("conv --shapes 64,32", "shape is '64,32': write CHANNELS,SIZE,BATCH"),
        ("conv --compression 2", "compression is 2: 4 of 9"),
        ("conv --compression ten", "compression is 'ten': a number is needed"),
        ("conv --group 0", "group is 0"),
        ("conv --rounds 0", "rounds must be at least 1, not 0"),
        ("conv --threads 0", "threads is 0: must be at least 1"),
        ("conv --json missing/it.json", "--json missing/it.json: there is no folder missing"),
        ("conv --json .", "--json . is a folder"),
        ("conv --model resnet18", "unknown flag --model"),
        ("pack --sparsity 1.5", "sparsity is 1.5"),
        ("pack --filters 0", "filters and channels must be at least 1"),
        ("step --model resnet21", "unknown model 'resnet21'"),
        ("step --batch-size 0", "batch_size and image_size must be at least 1"),
        ("step --compression 1", "compression is 1"),
        ("stages --steps 2", "steps must be at least 3"),
    ],
)
def test_mistakes(line: str, part: str, place: Path) -> None:
    outcome = call("bench", *line.split())
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("clicktrain: error: ")
    assert outcome.err.count("\n") == 1
    assert part in outcome.err
    assert files_below(place) == {}


def test_union_and_gating_side_by_side() -> None:
    """A row per layer: its width, time and what of that the gates take, in each run."""
    layer = {"layer": "conv2", "dense_shape": (8, 8, 3, 3), "pruned_shape": (5, 6, 3, 3), "note": "",
             "dense_input": (4, 8, 8, 8), "dense_flops": 100, "pruned_flops": 47, "flops_share": 1.0,
             "dense_ms": 4.0, "pruned_ms": 2.0, "time_share": 0.8, "share_of_saving": 0.9,
             "excess_ms": 0.1, "gates": (), "gate_ms": 0.0}  # fmt: skip
    table = {"run": "union", "what": "inference", "batch_size": 4, "dense_name": "NCHW",
             "pruned_name": "NCHW", "layers": [layer], "dense_ms": 5.0, "pruned_ms": 3.0,
             "flops_ratio": 0.5, "dense_rest_ms": 1.0, "pruned_rest_ms": 1.0,
             "rest_share_of_saving": None, "rest_excess_ms": None}  # fmt: skip
    narrow = {**layer, "pruned_shape": (3, 6, 3, 3), "pruned_ms": 2.25, "gates": ("scatter 3 of 5",),
              "gate_ms": 0.75}  # fmt: skip
    gating = {**table, "run": "gating", "layers": [narrow]}
    other = {**table, "run": "another network", "layers": [{**layer, "layer": "conv9"}]}
    console = Console(width=160, record=True, file=io.StringIO())
    runs._show({"settings": {"rounds": 1}, "rows": [], "by_layer": [table, gating, other]}, console)
    text = console.export_text()
    side = text[text.index("\ninference, batch 4 ") :]
    assert "Side by side: outputs x inputs of a layer, ms" in side
    assert re.search(r"layer +dense ms +union +gating\b", side)
    assert re.search(r"conv2 +4\.000 +5x6: 2\.000 +3x6: 2\.250 \(0\.750\)", side)
    assert re.search(r"everything else +1\.000 +1\.000 +1\.000", side)
    assert "another network" not in side  # it has other layers
    assert text.count("In brackets: what of pruned ms the select") == 1
