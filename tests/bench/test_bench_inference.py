"""``clicktrain bench inference``: one network, every engine, results held against float64."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from clicktrain.bench.inference import ENGINES, Engine, InferenceCase, bench_inference
from clicktrain.bench.inference.engines import read
from clicktrain.bench.inference.measure import LEAST_ROUNDS, TOLERANCE
from clicktrain.cli import main
from clicktrain.errors import UserError
from clicktrain.kernels.native import toolchain

CASE = InferenceCase("resnet8", 4.0, image_size=8)


def installed(*names: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def test_the_packed_and_the_dense_network_are_the_same() -> None:
    networks = CASE.networks()
    x = CASE.images(3)
    exact = networks.exact(x)
    with torch.inference_mode():
        torch.testing.assert_close(networks.packed(x).double(), exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(networks.dense(x).double(), exact, rtol=1e-4, atol=1e-5)
    again = CASE.networks()
    assert torch.equal(again.exact(CASE.images(3)), exact), "the same whenever it is asked for"


@pytest.mark.long
@pytest.mark.skipif(toolchain() is None, reason="needs a C compiler")
def test_every_engine_that_is_here_is_right() -> None:
    engines = tuple(name for name in ENGINES if name != "torch-compile")
    rows, missing = bench_inference(
        "resnet8", compressions=(4.0,), batches=(3,), engines=engines, image_size=8, rounds=1
    )
    assert {(row.engine, row.precision) for row in rows} >= {
        ("clicktrain-c", "fp32"), ("clicktrain", "fp32"), ("torch", "bf16"),
    }  # fmt: skip
    assert ("onnxruntime" in {row.engine for row in rows}) == installed("onnx", "onnxscript", "onnxruntime")
    dense = {row.precision for row in rows if not ENGINES[row.engine].sparse}
    for row in rows:
        assert row.max_error <= TOLERANCE[row.precision]
        assert row.ms > 0
        assert (row.compression, row.threads, row.batch) == (4.0, 1, 3)
        assert (row.ratio is None) == (ENGINES[row.engine].sparse is False or row.precision not in dense)
        assert row.rounds == 1
    assert all(one.reason for one in missing)
    if not installed("openvino"):
        assert ("openvino", "fp32") in {(one.engine, one.precision) for one in missing}


@pytest.mark.slow  # half a minute of compilation
def test_the_compiler_of_pytorch_is_right() -> None:
    rows, missing = bench_inference(
        "resnet8", compressions=(4.0,), batches=(2,), engines=("torch-compile",), image_size=8, rounds=1
    )
    assert {row.precision for row in rows} == {"fp32", "bf16"}
    assert not missing


def test_an_engine_that_is_wrong_has_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(networks, x, threads, precision):  # type: ignore[no-untyped-def]
        good = ENGINES["torch"].make(networks, x, threads, precision)
        return lambda: good() + 1

    def broken(networks, x, threads, precision):  # type: ignore[no-untyped-def]
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(ENGINES, "wrong", Engine(wrong))
    monkeypatch.setitem(ENGINES, "broken", Engine(broken))
    rows, missing = bench_inference(
        "resnet8",
        compressions=(4.0,),
        batches=(2,),
        engines=("wrong", "broken", "torch"),
        precisions=("fp32",),
        image_size=8,
        rounds=1,
    )
    assert [row.engine for row in rows] == ["torch"]
    reasons = {one.engine: one.reason for one in missing}
    assert "off by" in reasons["wrong"]
    assert reasons["broken"] == "RuntimeError: no such kernel"


def test_rounds_end_when_their_time_is_over() -> None:
    rows, _ = bench_inference(
        "resnet8", compressions=(4.0,), batches=(1,), engines=("torch",), precisions=("fp32",), image_size=8,
        rounds=1000, seconds=0.0,
    )  # fmt: skip
    assert [row.rounds for row in rows] == [LEAST_ROUNDS]


def test_int8_is_read_back_as_numbers() -> None:
    assert read(torch.ones(2, 3)).dtype == torch.float64


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"engines": ("tvm",)}, "engine is one or more of clicktrain-c"),
        ({"precisions": ("fp8",)}, "precision is one or more of fp32, bf16, int8, not fp8"),
        ({"batches": (0,)}, "batch is [0]: give numbers of at least 1"),
        ({"threads": 0}, "threads is [0]"),
        ({"compressions": (1.0,)}, "compression is 1"),
        ({"model": "mobilenet_v0"}, "mobilenet_v0"),
    ],
)
def test_a_wrong_setting_is_one_sentence(settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        bench_inference(**{"model": "resnet8", "rounds": 1, **settings})  # type: ignore[arg-type]
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_the_command_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "inference.json"
    words = "bench inference --model resnet8 --image-size 8 --batch 1 --compression 4 --rounds 1"
    assert main([*words.split(), "--engine", "torch", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    keys = {"model", "compression", "batch", "threads", "engine", "precision", "ms", "max_error"}
    assert keys <= result["rows"][0].keys()
    assert {row["precision"] for row in result["rows"]} == {"fp32", "bf16"}
    assert result["machine"]["threads"] == 1
    assert "torch" in capsys.readouterr().out
