"""Registered operators are called where somebody looks at graphs; elsewhere what they call."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from clicktrain.errors import UserError
from clicktrain.kernels.batch_norm2d import affine_blocked, batch_norm2d_blocked
from clicktrain.kernels.blocked_layout import block_batch, unblock_batch
from clicktrain.kernels.native import toolchain

TOOLS = toolchain()
pytestmark = pytest.mark.skipif(TOOLS is None, reason="there is no C compiler")
LANES = TOOLS.lanes(torch.float32) if TOOLS else 1


def network(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = batch_norm2d_blocked(block_batch(x, LANES), weight, bias, None, len(x), 1e-5, "relu")[0]
    return unblock_batch(affine_blocked(y, weight, bias, y, len(x), "none"), len(x))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in ((5, 3, 4, 4), (3,), (3,))]
    x, weight, bias = (one.requires_grad_() for one in made)
    return x, weight, bias


class Watch(TorchDispatchMode):
    """Collects the names of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


NAMES = ("block_batch", "batch_norm2d_blocked", "affine_blocked", "unblock_batch")


def test_whoever_looks_sees_operators() -> None:
    x, weight, bias = inputs()
    with Watch() as watch:
        network(x, weight, bias).sum().backward()
    seen = " ".join(watch.seen)
    assert all(f"clicktrain.{name}.default" in seen for name in (*NAMES, "batch_norm2d_blocked_backward"))
    with torch.no_grad():
        graph = make_fx(network)(x, weight, bias).graph
    assert all(any(name in str(node.target) for node in graph.nodes) for name in NAMES)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_has_operators() -> None:
    traced = torch.jit.trace(network, tuple(one.detach() for one in inputs()))  # type: ignore[no-untyped-call]
    assert all(f"clicktrain::{name}" in str(traced.graph) for name in NAMES)


def test_both_ways_give_the_same_to_the_last_bit() -> None:
    direct, watched = inputs(), inputs()
    network(*direct).square().sum().backward()
    with Watch():
        network(*watched).square().sum().backward()
    for a, b in zip(direct, watched, strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad)


def test_no_gradient_is_recorded_where_none_is_wanted() -> None:
    x, weight, bias = inputs()
    with torch.no_grad():
        assert not network(x, weight, bias).requires_grad
    with torch.inference_mode():
        y = network(x, weight, bias)
    assert torch.equal(y, network(x, weight, bias))
    frozen = network(x, weight.detach(), bias.detach())
    frozen.sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_second_derivatives_are_refused() -> None:
    x, weight, bias = inputs()
    (g,) = torch.autograd.grad(network(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(UserError, match="no second derivatives"):
        g.sum().backward()


def test_copies_and_parameters_are_plain() -> None:
    x, weight, bias = inputs()
    parameters = [torch.nn.Parameter(t.detach().clone()) for t in (weight, bias)]
    y = network(x, *copy.deepcopy(parameters))
    assert y.grad_fn is not None
    assert "Direct" in type(y.grad_fn).__name__


def test_what_has_outlived_a_function_transform_is_what_was_inside() -> None:
    x, weight, bias = inputs()
    kept = []

    def function(x: Tensor) -> Tensor:
        kept.append(x * 1)
        return kept[0].square().sum()

    torch.func.grad(function)(x.detach())
    want = network(x, weight, bias)
    own = network(kept[0], weight, bias)
    assert torch.equal(own, want)
    own.sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert torch.equal(network(kept[0], weight, bias), want)
