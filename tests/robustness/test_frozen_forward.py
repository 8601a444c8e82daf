"""An accelerated network does at each call what the network does, whatever its forward decides."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import frozen_kinds
import numpy
import pytest
import torch
from frozen_kinds import KINDS, LOWERED_WHOLE, Net, Outermost
from torch import Tensor, nn

import clicktrain
from clicktrain.compiler import Accelerated
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.pack_model import pack_model_

pytestmark = pytest.mark.skipif(toolchain() is None, reason="needs a C compiler")
MODES = (True, True, False, True, False, False, True)


def packed(kind: Any, net: type[Net] = Net) -> Net:
    torch.manual_seed(0)
    model = net(kind).double()
    masks = {
        name: torch.rand(layer.weight.shape) < 0.4
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.in_channels > 3
    }
    pack_model_(model, masks)
    return model


def accelerated(model: nn.Module, x: Tensor) -> tuple[Accelerated, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = clicktrain.accelerate(model, x, rule="sparse")
    assert isinstance(fast, Accelerated)
    return fast, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def calls(model: nn.Module, images: list[Tensor]) -> list[tuple[Any, ...]]:
    """Outputs, gradients, buffers and random numbers of calls in changing modes."""
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    seen = []
    for training, image in zip(MODES, images, strict=True):
        model.train(training)
        x = image.clone().requires_grad_()
        model.zero_grad()
        output = model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output.square().sum().backward()
        seen.append(
            (
                output.detach(),
                x.grad,
                {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
                {name: b.clone() for name, b in model.named_buffers()},
                torch.rand(2),
                random.random(),
                float(numpy.random.rand()),
            )
        )
    return seen


def assert_same_calls(fast: nn.Module, plain: nn.Module, images: list[Tensor]) -> None:
    for mine, theirs in zip(calls(fast, images), calls(plain, images), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("net", [Net, Outermost])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_call_is_the_networks_own(kind: Any, net: type[Net]) -> None:
    model = packed(kind, net)
    plain = copy.deepcopy(model)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    fast, told = accelerated(model, x)
    sizes = [x, x + 1, x - 1, torch.randn(3, 3, 6, 6).double(), x, torch.randn(5, 3, 8, 8).double(), -x]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_calls(fast, plain, sizes)
    own = fast.base.get_submodule("middle")
    other = plain.get_submodule("middle")
    assert own.n == other.n
    assert len(own.seen) == len(other.seen)
    assert set(vars(own)) == set(vars(other))
    assert not any(isinstance(value, torch.fx.Proxy) for value in vars(own).values())
    assert bool(told) == (kind.__name__ not in LOWERED_WHOLE), told


def test_the_smallest_module_runs_as_written_and_the_rest_is_lowered() -> None:
    fast, told = accelerated(packed(frozen_kinds.counter), torch.randn(4, 3, 6, 6).double())
    assert len(told) == 1
    assert told[0].startswith("middle changes .n at each call: run as written, and packed layers inside run")
    code = fast.graph(torch.randn(4, 3, 6, 6).double()).code
    assert "self.base.middle(" in code
    assert "self.base.e" not in code
    assert fast.base.middle.c.impl == "blocked"  # type: ignore[union-attr]


def test_the_outermost_forward_runs_as_written() -> None:
    fast, told = accelerated(packed(frozen_kinds.counter, Outermost), torch.randn(4, 3, 6, 6).double())
    assert told == [
        "Outermost changes .n at each call: 2 of its packed layers run sparse one by one, which converts "
        "their activations each time; all else runs as it is written"
    ]
    operators = {row["layer"]: row["operator"] for row in fast.plan.table()}
    assert operators == {
        "middle.c": "sparse blocked", "middle.d": "dense nchw fp32", "e": "sparse blocked"
    }  # fmt: skip
    assert fast.plan.notes == (told[0],)


@pytest.mark.parametrize("what", ["attribute", "on the view", "namespace", "global", "class"])
def test_a_value_that_forward_reads_may_change(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read = frozen_kinds.values_read
    model = packed(read)
    plain = copy.deepcopy(model)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    fast, told = accelerated(model, x)
    assert not told
    torch.testing.assert_close(fast(x), plain(x))
    before = fast(x)
    if what == "attribute":
        model.middle.alpha = plain.middle.alpha = 0.0
    elif what == "on the view":
        fast.middle.alpha = plain.middle.alpha = 0.5
    elif what == "namespace":
        model.middle.config.alpha = plain.middle.config.alpha = 0.0
    elif what == "global":
        monkeypatch.setattr(frozen_kinds, "SCALE", 0.0)
    else:
        monkeypatch.setattr(frozen_kinds.Middle, "level", 0.0)
    torch.testing.assert_close(fast(x), plain(x))
    assert not torch.allclose(fast(x), before)


def test_a_value_that_always_changes_is_left_to_the_module() -> None:
    model = packed(frozen_kinds.values_read)
    plain = copy.deepcopy(model)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    fast, _ = accelerated(model, x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(12):
            model.middle.alpha = plain.middle.alpha = 1 - step / 12
            torch.testing.assert_close(fast(x), plain(x))
    told = [str(w.message) for w in caught if "changes between calls" in str(w.message)]
    assert len(told) == 1
    assert told[0].startswith("middle reads alpha, which changes between calls: run as written")


def test_attributes_of_the_view_are_the_models() -> None:
    model = packed(frozen_kinds.feature_kept)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    fast, _ = accelerated(model, x)
    fast.label = "mine"
    assert model.label == "mine"
    del fast.label
    assert not hasattr(model, "label")
    fast(x)
    kept = fast.middle.last
    assert kept is model.middle.last
    torch.testing.assert_close(kept, model.middle.c(torch.relu(model.a(x))))


@pytest.mark.parametrize("place", ["a", "middle", "middle.c", "e"])
def test_hooks_see_every_call_and_may_change_it(place: str) -> None:
    model = packed(frozen_kinds.nothing_odd)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    fast, _ = accelerated(model, x)
    seen: list[Any] = []
    handle = model.get_submodule(place).register_forward_hook(
        lambda m, args, y: seen.append(type(y)) or 2 * y
    )  # type: ignore[func-returns-value]
    torch.testing.assert_close(fast(x), model(x))
    assert seen == [Tensor, Tensor]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again, _ = accelerated(model, x)
    assert seen == [Tensor, Tensor]
    torch.testing.assert_close(again(x), model(x))
    assert seen == [Tensor] * 4
    handle.remove()
    torch.testing.assert_close(fast(x), model(x))


def test_layers_that_are_put_in_later_are_called() -> None:
    model = packed(frozen_kinds.nothing_odd)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    fast, _ = accelerated(model, x)
    model.middle = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()).double()
    torch.testing.assert_close(fast(x), model(x))
    model.middle.append(nn.Conv2d(8, 8, 1).double())
    torch.testing.assert_close(fast(x), model(x))
    model.middle[0].forward = lambda y: 3 * y  # type: ignore[method-assign]
    torch.testing.assert_close(fast(x), model(x))
