"""A loop of one's own whose network runs on the fast kernels by itself, while it is packed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_loops import EPOCHS, METHODS_MADE, PER_EPOCH, Net, attached, batch, network, sgd, train
from torch import Tensor, nn

from clicktrain.compiler import LoweringPlan
from clicktrain.errors import MissedTarget, UserError
from clicktrain.kernels.native import toolchain
from clicktrain.methods import ClickTrain, Pruner, RigL

pytestmark = pytest.mark.skipif(toolchain() is None, reason="needs a C compiler")

TOTAL = EPOCHS * PER_EPOCH
HALF = TOTAL // 2 + 4
"""Batches after which every method that packs has packed."""


def moving() -> RigL:
    return RigL(compression=3, granularity="pattern", densities="uniform", interval=4)


def fast(model: nn.Module) -> bool:
    """Whether calls go to the fast kernels."""
    return model.__dict__.get("_compiled_call_impl") is not None


def loop(method: Any, batches: int = TOTAL, **more: Any) -> tuple[Net, Pruner]:
    model = network()
    pruner = attached(method, model, sgd(model), **more)
    train(model, pruner, batches=range(batches))
    return model, pruner


def close(one: nn.Module, other: nn.Module, tolerance: float = 1e-3) -> None:
    expected = other.state_dict()
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, msg=name)


QUICK = "clicktrain"


@pytest.mark.parametrize(
    "name",
    [QUICK, *(pytest.param(n, marks=pytest.mark.long) for n in (*METHODS_MADE, "moving") if n != QUICK)],
)
def test_every_method_learns_the_same(name: str) -> None:
    """What is not packed (channels, nothing to prune) trains as it does; the rest on the fast kernels."""
    made = METHODS_MADE.get(name, moving)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissedTarget)
        warnings.filterwarnings("ignore", "no call of the packed network")  # N:M packs at the very end
        plain, slow = loop(made(), packed=True, accelerate=False)
        quick, pruner = loop(made(), accelerate=True)
        chosen = [event for event in pruner.events if event["event"] == "operators"]
        assert fast(quick) or not chosen
        if name in ("clicktrain", "campfire", "clicktrain-gradual", "admm-patterns", "moving"):
            assert fast(quick)
        slow.finish()
        pruner.finish()
    assert not fast(quick)
    assert {k: v.tolist() for k, v in pruner.masks.items()} == {k: v.tolist() for k, v in slow.masks.items()}
    close(quick, plain)


def test_moving_masks_are_fast_from_the_first_step() -> None:
    _, pruner = loop(moving(), 1, accelerate=True)
    event = next(event for event in pruner.events if event["event"] == "operators")
    assert event["epoch"] == 0


@pytest.mark.long
@pytest.mark.parametrize("method", [lambda: ClickTrain(compression=3), moving], ids=["clicktrain", "moving"])
def test_calls_of_all_kinds(method: Any) -> None:
    """Other numbers and sizes of images, memory formats, autocast, evaluation: as on packed layers."""
    model, pruner = loop(method(), HALF, accelerate=True)
    plain = copy.deepcopy(model)
    assert fast(model)
    assert not fast(plain), "a copy is plain"
    x = torch.randn(5, 3, 9, 7, generator=torch.Generator().manual_seed(3))
    for mode in (True, False):
        model.train(mode)
        plain.train(mode)
        for images in (x, x[:1], x[..., :6], x.to(memory_format=torch.channels_last)):
            for bf16 in (False, True):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                    ours, theirs = model(images), plain(images)
                tolerance = 0.1 if bf16 else 1e-3
                assert ours.dtype == theirs.dtype
                torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), plain(x), rtol=1e-3, atol=1e-3)
    pruner.close()
    assert not fast(model)


def test_it_saves_loads_and_copies_at_any_moment() -> None:
    model = network()
    pruner = attached(ClickTrain(compression=3), model, sgd(model), accelerate=True)
    x, _ = batch(100)

    def look(number: int) -> None:
        if number % 5:
            return
        modes = [module.training for module in model.modules()]
        expected = model.eval()(x)
        stored = io.BytesIO()
        torch.save(model.state_dict(), stored)
        stored.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        loaded = copy.deepcopy(model)
        loaded.load_state_dict(torch.load(stored, weights_only=True))
        for other in (*copies, loaded):
            torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode

    train(model, pruner, after_step=look)
    assert fast(model)
    final = pruner.finish()
    assert final is model
    assert type(final.body) is nn.Conv2d


def test_hooks_of_the_loop_run() -> None:
    model, pruner = loop(ClickTrain(compression=3), HALF, accelerate=True)
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append("before"))
    model.body.register_forward_hook(lambda *_: seen.append("inside"))
    model.register_forward_hook(lambda *_: seen.append("after"))
    model(batch(0)[0])
    assert seen == ["before", "inside", "after"]
    pruner.close()


@pytest.mark.parametrize("method", [lambda: ClickTrain(compression=3), moving], ids=["clicktrain", "moving"])
def test_a_resumed_loop_goes_on_bit_for_bit(method: Any) -> None:
    model, pruner = loop(method(), HALF, accelerate=True)
    optimizer = pruner.optimizer
    state = copy.deepcopy((pruner.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(model, pruner, batches=range(HALF, TOTAL))

    other = network(1)
    again = sgd(other)
    second = attached(method(), other, again, accelerate=True)
    second.load_state_dict(state[0])
    other.load_state_dict(state[1])
    again.load_state_dict(state[2])
    train(other, second, batches=range(HALF, TOTAL))
    assert fast(other)
    assert LoweringPlan.from_json(second.state_dict()["operators"]).operators()
    for one, two in zip(pruner.finish().parameters(), second.finish().parameters(), strict=True):
        assert torch.equal(one, two)


def test_short_runs_are_left_alone_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default a minute of work has to be left; choosing and building kernels takes about as long."""
    model, pruner = loop(ClickTrain(compression=3), packed=True)
    assert not fast(model)
    assert not any(event["event"] == "operators" for event in pruner.events)
    pruner.finish()
    monkeypatch.setattr("clicktrain.methods.driver.acceleration.SHORT_FLOPS", 0)
    model, pruner = loop(ClickTrain(compression=3), packed=True)
    assert fast(model)
    assert next(e for e in pruner.events if e["event"] == "operators")["rule"] == "measured"
    pruner.finish()


def test_a_lost_pruner_leaves_a_network_that_works() -> None:
    model, pruner = loop(ClickTrain(compression=3), HALF, accelerate=True)
    x, _ = batch(0)
    expected = model.eval()(x)
    del pruner
    gc.collect()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_finish_hands_back_packed_layers_if_asked() -> None:
    model, pruner = loop(ClickTrain(compression=3), accelerate=True)
    assert pruner.finish(packed=True) is model
    assert not fast(model)
    assert type(model.body) is not nn.Conv2d


def test_a_wrapper_of_the_network_is_accelerated_inside() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    model = network()
    pruner = attached(ClickTrain(compression=3), model, sgd(model), accelerate=True)
    train(pruner.wrapped(Wrapper), pruner)
    assert fast(model)
    pruner.finish()


def test_a_compiled_network_keeps_its_calls() -> None:
    model = network()
    calls: list[int] = []

    def compiled(*args: Any) -> Any:
        calls.append(1)
        return model._call_impl(*args)

    model._compiled_call_impl = compiled  # what Module.compile() sets, without its minute
    pruner = attached(ClickTrain(compression=3), model, sgd(model), accelerate=True)
    with pytest.warns(UserWarning, match="its calls are compiled"):
        train(model, pruner)
    pruner.finish()
    assert len(calls) == TOTAL
    assert model._compiled_call_impl is compiled


def test_what_was_asked_and_did_not_happen_is_a_warning() -> None:
    """A loop that calls ``forward`` itself, as code under ``torch.compile`` does in effect."""
    model = network()
    pruner = attached(ClickTrain(compression=3), model, sgd(model), accelerate=True)
    for number in range(TOTAL):
        x, y = batch(number)
        loss = F.cross_entropy(model.forward(x), y)
        loss.backward()
        pruner.observe(loss)
        pruner.optimizer.step()
        pruner.optimizer.zero_grad()
    with pytest.warns(UserWarning, match="no call of the packed network was accelerated"):
        pruner.finish()


def test_without_a_compiler_it_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clicktrain.methods.driver.acceleration.toolchain", lambda: None)
    with pytest.warns(UserWarning, match="will not be accelerated"):
        _, pruner = loop(ClickTrain(compression=3), accelerate=True)
    pruner.finish()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, pruner = loop(ClickTrain(compression=3), packed=True)
    pruner.finish()


def test_a_wrong_value_is_one_sentence() -> None:
    with pytest.raises(UserError, match="accelerate is True, False, or None for where it pays, not 'yes'"):
        loop(ClickTrain(compression=3), accelerate="yes")
