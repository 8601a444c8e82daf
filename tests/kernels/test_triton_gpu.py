"""Triton's kernels on a GPU, against float64; what needs none is in the other files named triton."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from clicktrain import accelerate
from clicktrain.bench.conv import Shape
from clicktrain.bench.gpu import GpuCase, bench_case, graph_ms, need_gpu
from clicktrain.compiler import RecordedStep
from clicktrain.errors import UserError
from clicktrain.kernels.innermost_layout import batch_norm_innermost
from clicktrain.kernels.pack_model import pack_model_

GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("triton") is None, reason="needs an NVIDIA GPU and Triton"
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured() -> None:
    with pytest.raises(UserError, match="this needs an NVIDIA GPU that PyTorch can see"):
        need_gpu()


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("shape", [Shape(7, 5, 9, 6, 3), Shape(64, 96, 8, 8, 64)], ids=str)
@pytest.mark.parametrize("structure", [(4.0, 16, 1), (10.0, 1, 1)], ids=str)
def test_every_candidate_is_right(precision: str, shape: Shape, structure: tuple[float, int, int]) -> None:
    for row in bench_case(GpuCase(shape, *structure, precision)):
        assert row.sparse
        assert not row.failed


@GPU
@pytest.mark.gpu
def test_a_network_trains_on_the_gpu_as_its_dense_twin() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64))
    pack_model_(model, {"1": (torch.rand(2, 32, 3, 3) < 0.2).repeat_interleave(32, 0)})
    model = model.cuda()
    x = torch.randn(64, 3, 16, 16, device="cuda")
    fast = accelerate(model, x, rule="sparse")
    expected, got = model(x), fast(x)
    assert float((expected - got).abs().max() / expected.abs().max()) < 1e-2


@GPU
@pytest.mark.gpu
def test_a_graph_is_timed() -> None:
    x = torch.ones(1 << 20, device="cuda")
    assert 0 < graph_ms({"copy": lambda: x.clone()})["copy"] < 10


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(7, 5, 3, 9), (256, 64, 16, 16)], ids=str)
def test_a_batch_norm_with_addition_and_relu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(shape[1]).cuda()
    x, residual, grad = (torch.randn(shape, device="cuda").to(dtype) for _ in range(3))
    inputs = [x.double().requires_grad_(), residual.double().requires_grad_()]
    before = copy.deepcopy(norm).double()(inputs[0]) + inputs[1]
    grad[before.abs() < 1e-2] = 0  # which side of zero 16 bits are on
    expected = torch.autograd.grad(before.relu(), inputs, grad.double())
    own = [one.detach().permute(1, 2, 3, 0).contiguous().requires_grad_() for one in (x, residual)]
    y = batch_norm_innermost(own[0], norm, shape[0], own[1], "relu")
    assert type(y.grad_fn).__name__ == "FusedNormBackward"
    got = torch.autograd.grad(y, own, grad.permute(1, 2, 3, 0).contiguous())
    for mine, other in zip((y, *got), (before.relu(), *expected), strict=True):
        error = (mine.permute(3, 0, 1, 2).double() - other).abs().max() / other.abs().max()
        assert float(error.detach()) < 2e-2


@GPU
@pytest.mark.gpu
def test_a_recorded_step_is_the_step_as_written() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1)
    )
    pack_model_(model, {"3": (torch.rand(2, 64, 3, 3) < 0.2).repeat_interleave(32, 0)})
    results = []
    for recorded in (False, True):
        twin = copy.deepcopy(model).cuda()
        x = torch.randn(32, 3, 16, 16, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        fast = accelerate(twin, x, rule="sparse")
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        step = RecordedStep(lambda x, fast=fast: fast(x).square().mean(), fast)
        for _ in range(5):
            if recorded:
                step(x)
            else:
                fast(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert step.replays == (4 if recorded else 0), step.reason
        results.append(torch.cat([one.flatten() for one in twin.state_dict().values()]).double())
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)


@GPU
@pytest.mark.gpu
def test_a_step_that_reads_from_the_gpu_is_not_recorded() -> None:
    model = nn.Linear(8, 4).cuda()
    x = torch.randn(16, 8, device="cuda")
    step = RecordedStep(lambda x: model(x).mean() * (1 if x.sum().item() > 0 else 2), model)
    step(x)
    with pytest.warns(UserWarning, match="the step runs without a CUDA graph: it cannot be recorded"):
        step(x)
    step(x)
    assert step.replays == 0
    assert model.weight.grad is not None
