from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clicktrain.bench import step
from clicktrain.bench.memory import in_fresh_process
from clicktrain.bench.step import StepCase, bench_step, check_same
from clicktrain.bench.timing import WrongResultError
from clicktrain.errors import UserError
from clicktrain.kernels.sparse_conv2d import PackedConv2d

CASE = StepCase("resnet20", batch_size=2, image_size=8)


def test_width_is_that_of_the_network() -> None:
    def weights(width: float) -> int:
        return StepCase("resnet20", width=width).network().get_parameter("layer1.0.conv1.weight").numel()

    assert weights(0.5) * 4 == weights(1.0)


@pytest.mark.long
def test_rows() -> None:
    rows = bench_step(
        CASE, compressions=(4.0, 10.0), groups=(1, 4), rounds=1, compiled=False, memory=False, rule="sparse"
    )
    settings = [(row.compression, row.group) for row in rows]
    assert settings == [(4.0, 1), (4.0, 4), (10.0, 1), (10.0, 4)]
    for row in rows:
        assert row.model == "resnet20"
        assert row.density == pytest.approx(1 / row.compression, rel=0.2)
        assert row.dense_fp32_name in ("NCHW", "channels_last")
        assert row.dense_bf16_name in ("NCHW", "channels_last")
        assert row.ratio_fp32 == pytest.approx(row.dense_fp32_ms / row.sparse_ms)
        assert row.ratio_bf16 == pytest.approx(row.dense_bf16_ms / row.sparse_ms)
        assert row.sparse_memory_mb is None


def test_rows_without_bf16_and_with_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {
        ("NCHW", "fp32"): 30.0,
        ("channels_last", "fp32"): 20.0,
        ("NCHW", "bf16"): 12.0,
        ("channels_last", "bf16"): 14.0,
    }
    monkeypatch.setattr(
        step, "_memory", lambda case, kind=None, layout=None, **_: memory.get((layout, kind), 10.0)
    )
    single, low = bench_step(
        CASE,
        compressions=(4.0,),
        precisions=("fp32", "bf16"),
        rounds=1,
        compiled=False,
        bf16=False,
        rule="sparse",
    )
    assert single.dense_bf16_ms is single.dense_bf16_name is single.ratio_bf16 is None
    found = [(row.dense_memory_name, row.dense_memory_mb, row.sparse_memory_mb) for row in (single, low)]
    assert found == [("channels_last", 20.0, 10.0), ("NCHW", 12.0, 10.0)]
    assert (single.precision, single.activations, low.precision) == ("fp32", "parameters", "bf16")
    assert low.activations == "bf16"


def test_a_network_is_the_same_each_time() -> None:
    first, second = CASE.packed(4.0, 1), CASE.packed(4.0, 1)
    assert any(isinstance(m, PackedConv2d) for m in first.modules())
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(CASE.batch(), CASE.batch(), strict=True))


class Bent(nn.Module):
    """Computes what its network computes, with a gradient that is slightly off."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def named_parameters(self, *arguments: object, **flags: object):  # type: ignore[no-untyped-def]
        return self.inner.named_parameters()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y + (self.factor - 1) * (y - y.detach())


def test_same_networks_are_the_same_and_others_are_not() -> None:
    packed = CASE.packed(4.0, 1)
    x, y = CASE.batch()
    check_same(packed, copy.deepcopy(packed), x, y)
    check_same(packed, Bent(copy.deepcopy(packed), 1.0), x, y)
    with pytest.raises(WrongResultError, match=r"gradient of .* is off by"):
        check_same(packed, Bent(copy.deepcopy(packed), 1.1), x, y)
    with pytest.raises(WrongResultError, match="other parameters"):
        check_same(packed, CASE.network(), x, y)
    other = copy.deepcopy(packed)
    with torch.no_grad():
        next(m for m in other.modules() if isinstance(m, PackedConv2d)).values[0, 0] += 0.5
    with pytest.raises(WrongResultError, match="loss is"):
        check_same(packed, other, x, y)


def test_a_wrong_network_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "accelerated", lambda packed, *_, **__: Bent(packed, 1.1))
    monkeypatch.setattr(step, "median_ms", lambda *a, **k: pytest.fail("timed a wrong network"))
    with pytest.raises(WrongResultError):
        bench_step(CASE, compressions=(4.0,), rounds=1, compiled=False, memory=False)


def test_an_unknown_precision() -> None:
    with pytest.raises(UserError, match="precision is fp32 or bf16, not fp16"):
        bench_step(CASE, precisions=("fp16",), rounds=1)


@pytest.mark.parametrize("case", [StepCase(batch_size=0), StepCase(image_size=0), StepCase("resnet21")])
def test_a_case_that_cannot_be(case: StepCase) -> None:
    with pytest.raises(UserError):
        bench_step(case, rounds=1)


# ---------------------------------------------------------------- memory


@pytest.mark.skipif(sys.platform != "linux", reason="the highest point can be forgotten on Linux only")
def test_the_peak_is_that_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: in this one other tests have left their memory."""
    (tmp_path / "measured.py").write_text(
        """
import torch
from clicktrain.bench.memory import peak_mb

def prepare():
    torch.ones(60 << 18)  # 60 MB while preparing, gone before the step
    kept = torch.ones(10 << 18)
    return lambda: (torch.ones(20 << 18), kept)

print("megabytes", peak_mb(prepare))
"""
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert 28 < in_fresh_process("measured", {}) < 45


@pytest.mark.long
def test_memory_of_a_dense_step_in_a_process_of_its_own() -> None:
    assert step._memory(CASE, layout="NCHW", kind="fp32") > 1


@pytest.mark.long
def test_a_process_that_fails_is_told() -> None:
    with pytest.raises(RuntimeError, match="unknown model 'resnet21'"):
        step._memory(StepCase("resnet21"), layout="NCHW", kind="fp32")
    with pytest.raises(RuntimeError, match="No module named"):
        in_fresh_process("clicktrain.bench.nothing", {})
