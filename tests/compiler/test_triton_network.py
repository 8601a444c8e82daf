"""A network whose convolutions run by Triton's kernels, in its interpreter, from the compiler's choice on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from pruned_networks import assert_same_step
from torch import Tensor, nn

from clicktrain import accelerate
from clicktrain.compiler import Accelerated, LoweringPlan
from clicktrain.kernels.impls import candidates_for, register
from clicktrain.kernels.pack_model import pack_model_
from clicktrain.kernels.sparse_conv2d import IMPLS
from clicktrain.kernels.sparse_conv2d.api import OPERATOR

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton")


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The implementation for GPUs alone, and on the CPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    impls = dict(IMPLS)
    IMPLS.clear()  # type: ignore[attr-defined]
    register(OPERATOR, impls["reference"])
    register(OPERATOR, replace(impls["triton"], devices=("cpu", "cuda")))
    yield
    IMPLS.clear()  # type: ignore[attr-defined]
    IMPLS.update(impls)  # type: ignore[attr-defined]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.norm(self.conv(x)) + x).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.long
def test_a_network_is_lowered_and_right_in_training_and_evaluation() -> None:
    assert [impl.name for impl in candidates_for(OPERATOR, "cpu")] == ["triton"]
    torch.manual_seed(0)
    model = Residual()
    pack_model_(
        model, {name: torch.rand(model.get_submodule(name).weight.shape) < 0.5 for name in ("stem", "conv")}
    )  # type: ignore[arg-type, operator]
    model = model.double()
    reference = copy.deepcopy(model)
    x, y = torch.randn(8, 2, 4, 4, dtype=torch.float64), torch.randint(3, (8,))
    result = accelerate(model, x, rule="sparse")
    assert isinstance(result, Accelerated)
    choices = result.plan.by_layer()
    assert {
        name: (choices[name].layout, choices[name].operator) for name in ("stem", "conv")
    } == dict.fromkeys(("stem", "conv"), ("batch_innermost", "sparse triton"))
    assert choices["norm"].layout == "batch_innermost"
    assert result.graph(x).code.count("self.steps.batch_innermost_") == 1
    assert_same_step(result, reference, x, y)
    together = tuple(replace(c, statistics=c.layer == "conv") for c in result.plan.choices)
    plan = LoweringPlan.from_json(replace(result.plan, choices=together).to_json())
    joined = accelerate(model, x, plan=plan)
    assert isinstance(joined, Accelerated)
    assert_same_step(joined, reference, x, y)
    joined.eval()
    reference.eval()
    with torch.no_grad():  # norm, addition and activation are the convolution's epilogue
        torch.testing.assert_close(joined(x), reference(x))
