"""The blocked convolution as PyTorch sees it, and what it refuses."""

from __future__ import annotations

from typing import Literal

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.formats.packed import Structure
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.sparse_conv2d.blocked import launch
from clicktrain.kernels.sparse_conv2d.blocked.ops import sparse_conv2d_blocked
from clicktrain.kernels.sparse_conv2d.blocked.prepared import prepare
from clicktrain.kernels.sparse_conv2d.blocked.problem import ConvProblem, Phase, Tiling

OPERATORS = torch.ops.clicktrain
pytestmark = [
    pytest.mark.skipif(toolchain() is None, reason="there is no C compiler"),
    pytest.mark.usefixtures("poisoned_memory"),
]


@example(stride=2)
@given(st.integers(1, 2))
@settings(max_examples=2)
def test_operator_is_well_formed(stride: int) -> None:
    mask = torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    structure = Structure.from_mask(mask)
    plan, tables = prepare(structure, ConvProblem.make(3, 4, (3, 3), (5, 5), (stride, stride), (1, 1)))
    tools = toolchain()
    assert tools is not None
    generator = torch.Generator().manual_seed(1)
    shape = (1, 3, 5, 5, tools.lanes(torch.float64))
    x = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    values = torch.randn(structure.values_shape, dtype=torch.float64, generator=generator).requires_grad_()
    bias = torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_()
    text = plan.to_json()

    def call(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return sparse_conv2d_blocked(x, values, bias, list(tables), text)

    torch.use_deterministic_algorithms(False)
    assert torch.autograd.gradcheck(call, (x, values, bias), fast_mode=True)
    results = torch.library.opcheck(
        OPERATORS.sparse_conv2d_blocked.default, (x, values, bias, list(tables), text)
    )
    assert set(results.values()) == {"SUCCESS"}


def test_images_of_another_size_than_the_plan_is_for_are_refused() -> None:
    tools = toolchain()
    assert tools is not None
    structure = Structure.from_mask(torch.ones(4, 3, 3, 3, dtype=torch.bool))
    plan, tables = prepare(structure, ConvProblem.make(3, 4, (3, 3), (6, 6), padding=(1, 1)))
    values, index, text = torch.ones(structure.values_shape), list(tables), plan.to_json()
    x, gy = (torch.zeros(1, planes, 6, 6, tools.lanes(torch.float32)) for planes in (3, 4))
    small = x[:, :, :5, :5].contiguous()
    with pytest.raises(UserError, match=r"plan is for \[3, 6, 6\] \(C, H, W\), not for \[3, 5, 5\]"):
        launch.forward(small, values, None, index, text)
    with pytest.raises(UserError, match=r"plan is for \[4, 6, 6\]"):
        launch.dgrad(gy[:, :3], values, index, text)
    with pytest.raises(UserError, match="plan is for"):
        launch.wgrad(small, gy, structure.values_shape, index, text)
    with pytest.raises(UserError, match="this layer's plan says"):
        launch.wgrad(x, gy[:, :, :5], structure.values_shape, index, text)


def test_what_kernels_would_misread_is_refused() -> None:
    structure = Structure.from_mask(torch.ones(2, 2, 1, 1, dtype=torch.bool))
    plan, tables = prepare(structure, ConvProblem.make(2, 2, (1, 1), (3, 3)))
    text, index = plan.to_json(), list(tables)
    tools = toolchain()
    assert tools is not None
    x, values = torch.randn(1, 2, 3, 3, tools.lanes(torch.float32)), torch.ones(2, 2)
    low = x.bfloat16()
    for arguments in (
        (low, values.bfloat16(), None),
        (x, values.double(), None),
        (x, values, low[0, :, 0, 0, 0]),
    ):
        with pytest.raises(UserError, match=r"has weights and bias of torch\.float32, not of"):
            sparse_conv2d_blocked(*arguments, index, text)
    with pytest.raises(UserError, match="has 2 filters, its bias 1 numbers"):
        sparse_conv2d_blocked(x, values, torch.ones(1), index, text)
    with pytest.raises(UserError, match=r"one of float32, float64, bfloat16, not of torch\.float16"):
        sparse_conv2d_blocked(x.half(), values, None, index, text)
    with pytest.raises(UserError, match="convert with block_batch"):
        sparse_conv2d_blocked(torch.randn(1, 2, 3, 3, 3), values, None, index, text)
    with pytest.raises(UserError, match="both have to be alike"):
        launch.wgrad(x, low, [2, 2], index, text)
    with pytest.raises(UserError, match="has weights and bias"):
        launch.dgrad(low, values.bfloat16(), index, text)


def test_misaligned_input_is_copied_not_misread() -> None:
    mask = torch.ones(2, 2, 1, 1, dtype=torch.bool)
    structure = Structure.from_mask(mask)
    plan, tables = prepare(structure, ConvProblem.make(2, 2, (1, 1), (3, 3)))
    tools = toolchain()
    assert tools is not None
    lanes = tools.lanes(torch.float32)
    flat = torch.randn(1 + 2 * 9 * lanes)
    x = flat[1:].view(1, 2, 3, 3, lanes)
    y = sparse_conv2d_blocked(x, torch.ones(2, 2), None, list(tables), plan.to_json())
    assert torch.allclose(y[:, 0], x.sum(1))


class _Layer(torch.nn.Module):
    def __init__(self, structure: Structure, problem: ConvProblem) -> None:
        super().__init__()
        plan, tables = prepare(structure, problem)
        self.plan, self.tables = plan.to_json(), list(tables)
        self.values = torch.nn.Parameter(torch.randn(structure.values_shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(sparse_conv2d_blocked(x, self.values, None, self.tables, self.plan))


@pytest.mark.filterwarnings("ignore")
def test_operator_is_exported_and_compiled_as_one_node() -> None:
    torch.use_deterministic_algorithms(False)
    tools = toolchain()
    assert tools is not None
    mask = torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    layer = _Layer(Structure.from_mask(mask), ConvProblem.make(3, 4, (3, 3), (5, 5), (1, 1), (1, 1)))
    x = torch.randn(2, 3, 5, 5, tools.lanes(torch.float32))
    want = layer(x)
    exported = torch.export.export(layer, (x,))
    assert sum("sparse_conv2d_blocked" in str(node.target) for node in exported.graph.nodes) == 1
    assert torch.equal(exported.module()(x), want)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), want)
    compiled(x).sum().backward()
    own = layer.values.grad
    layer.values.grad = None
    layer(x).sum().backward()
    assert own is not None
    assert torch.equal(own, layer.values.grad)


@pytest.mark.parametrize("code", ["unrolled", "cache_blocked", "indexed"])
def test_other_weights_than_the_plan_is_for_are_refused(
    code: Literal["unrolled", "cache_blocked", "indexed"],
) -> None:
    tools = toolchain()
    assert tools is not None
    structure = Structure.from_mask(torch.ones(4, 3, 3, 3, dtype=torch.bool))
    tiling = Tiling((2, 2), code=code)
    tilings: dict[Phase, Tiling] = {"forward": tiling, "dgrad": tiling}
    if code != "cache_blocked":
        tilings["wgrad"] = Tiling((1, 2), code=code)
    plan, tables = prepare(structure, ConvProblem.make(3, 4, (3, 3), (6, 6), padding=(1, 1)), 1, tilings)
    index, text = list(tables), plan.to_json()
    x, gy = (torch.zeros(1, planes, 6, 6, tools.lanes(torch.float32)) for planes in (3, 4))
    for count in (107, 109):
        for images in (1, 0):
            with pytest.raises(UserError, match=f"plan is not for {count} weights"):
                launch.wgrad(x[:images], gy[:images], (count,), index, text)
        with pytest.raises(UserError, match=f"plan is not for {count} weights"):
            launch.forward(x, torch.ones(count), None, index, text)
        if code != "indexed" or count < 108:  # what there is more than that is not read
            with pytest.raises(UserError, match=f"plan is not for {count} weights"):
                launch.dgrad(gy, torch.ones(count), index, text)
