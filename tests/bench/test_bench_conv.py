from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clicktrain.bench import conv, timing
from clicktrain.bench.conv import Shape, bench_conv, geometric_means
from clicktrain.bench.pack import bench_pack
from clicktrain.bench.timing import WrongResultError
from clicktrain.errors import UserError
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.sparse_conv2d import IMPLS
from clicktrain.kernels.sparse_conv2d.blocked import ops

needs_compiler = pytest.mark.skipif(toolchain() is None, reason="needs a C compiler")
TINY = Shape(8, 16, 4, 5, 3)


def test_shapes_are_parsed() -> None:
    assert Shape.parse("64,32,16") == Shape(64, 64, 32, 32, 16)
    assert Shape.parse("8,16,4,5,3") == TINY
    assert str(TINY) == "8->16 @ 4x5, batch 3"
    assert len(conv.SHAPES) == 8


@pytest.mark.parametrize(
    "text", ["64", "64,32", "64,32,0", "64,32,16,8", "64x32x16", "a,b,c", "", "64,32,-1"]
)
def test_what_is_no_shape(text: str) -> None:
    with pytest.raises(UserError, match="write CHANNELS,SIZE,BATCH"):
        Shape.parse(text)


@needs_compiler
def test_rows_and_means() -> None:
    rows = bench_conv([TINY], compressions=(4.0,), groups=(1, 2), rounds=1, tune=False, peak_gflops=100.0)
    assert [(row.group, row.phase) for row in rows] == [
        (group, phase) for phase in conv.PHASES for group in (1, 2)
    ]
    for row in rows:
        assert row.shape == (8, 16, 4, 5, 3)
        assert row.dense_name in ("NCHW", "channels_last")
        assert row.dense_bf16_ms is not None
        assert row.ratio == pytest.approx(row.dense_ms / row.sparse_ms)
        assert row.ratio_bf16 == pytest.approx(row.dense_bf16_ms / row.sparse_ms)
        assert row.density == pytest.approx(4 * 4 / 72)  # 4 kernels of 8: 4.5 would be a quarter
        assert row.fraction_of_peak is not None
        assert row.fraction_of_peak > 0
    means = geometric_means(rows)
    assert list(means)[:2] == ["4x G=1 forward", "4x G=2 forward"]
    assert means["4x G=1 forward"] == pytest.approx(rows[0].ratio)
    own = [row.ratio for row in rows if row.group == 2]
    assert means["4x G=2 all"] == pytest.approx(math.prod(own) ** (1 / 3))
    assert geometric_means(rows, "ratio_bf16").keys() == means.keys()


@needs_compiler
def test_the_fastest_tiling_is_kept() -> None:
    layer = conv._SparseLayer(conv._Data(TINY), 4.0, 2, "fp32", IMPLS["blocked"], 0, True)
    assert all(len(variants) > 1 for variants in layer.variants.values())
    assert {v.tiling.filters_per_tile for v in layer.variants["forward"]} == {1, 2}
    assert {v.tiling.filters_per_tile for v in layer.variants["dgrad"]} == {1}
    layer.check()
    layer.choose()
    assert all(layer.best[phase] in variants for phase, variants in layer.variants.items())


@needs_compiler
def test_rows_in_bf16_stand_beside_those_in_fp32() -> None:
    rows = bench_conv([TINY], compressions=(4.0,), precisions=("fp32", "bf16"), rounds=1, bf16=False)
    assert [row.precision for row in rows] == ["fp32", "bf16"] * 3
    assert set(geometric_means(rows)) == {
        f"4x G=1{kept} {phase}" for kept in ("", " bf16") for phase in ("forward", "dgrad", "wgrad", "all")
    }
    with pytest.raises(UserError, match="precision is fp32 or bf16, not fp8"):
        bench_conv([TINY], precisions=("fp8",))


@needs_compiler
def test_without_bf16_there_is_no_such_ratio() -> None:
    rows = bench_conv([TINY], compressions=(4.0,), rounds=1, tune=False, bf16=False)
    assert {row.ratio_bf16 for row in rows} == {None}
    assert {row.fraction_of_peak for row in rows} == {None}
    assert geometric_means(rows, "ratio_bf16") == {}


@needs_compiler
@pytest.mark.parametrize("name", ["forward", "dgrad", "wgrad"])
def test_a_wrong_result_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = "sparse_conv2d_blocked" + ("" if name == "forward" else f"_{name}")
    right = getattr(ops, operator)

    def wrong(*arguments: Any) -> torch.Tensor:
        result: torch.Tensor = right(*arguments).detach().clone()
        result.view(-1)[0] += 0.01 * result.abs().max()
        return result

    monkeypatch.setattr(ops, operator, wrong)
    monkeypatch.setattr(conv, "median_ms", lambda *a, **k: pytest.fail("timed a wrong result"))
    with pytest.raises(WrongResultError, match=f"{name} of 8->16 @ 4x5, batch 3 at 4x, group 1"):
        bench_conv([TINY], compressions=(4.0,), rounds=1, tune=False)


@needs_compiler
def test_results_that_are_not_numbers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.sparse_conv2d_blocked
    monkeypatch.setattr(ops, "sparse_conv2d_blocked", lambda *a: right(*a) * float("nan"))
    with pytest.raises(WrongResultError):
        bench_conv([TINY], compressions=(4.0,), rounds=1, tune=False)


@needs_compiler
def test_operations_leave_the_padding_out() -> None:
    layer = conv._SparseLayer(conv._Data(TINY), 4.0, 1, "fp32", IMPLS["blocked"], 0, False)
    ones = F.conv2d(torch.ones(3, 8, 4, 5), layer.mask.float(), padding=1)
    assert layer.operations() == 2 * int(ones.sum())


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "toolchain", lambda: None)
    with pytest.raises(UserError, match="there is no C compiler"):
        bench_conv([TINY], rounds=1)


def test_pack_rows() -> None:
    rows = bench_pack(8, 16, sparsities=(0.75, 0.9), rounds=1)
    assert [row.case for row in rows] == ["8x144", "8x144"]
    assert [row.density for row in rows] == pytest.approx([0.25, 4 * 4 / 144])
    for row in rows:
        assert row.ratio == pytest.approx(row.csr_ms / row.pack_ms)
        assert row.ratio_masked_select == pytest.approx(row.masked_select_ms / row.pack_ms)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, 1.5, float("nan"), 0.2])
def test_sparsity_that_cannot_be(sparsity: float) -> None:
    with pytest.raises(UserError):
        bench_pack(8, 16, sparsities=(sparsity,), rounds=1)


def test_packed_values_that_are_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clicktrain.bench.pack.pack_values", lambda s, w: torch.zeros(s.values_shape))
    with pytest.raises(WrongResultError):
        bench_pack(8, 16, rounds=1)
