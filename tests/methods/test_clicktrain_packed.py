"""Stage 5 on packed values: the same run as with dense tensors and zeros."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_loop import OPTIMIZERS, PRUNED, Net, assert_pruned, assert_same, batches, conv_weights, make, train
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.kernels.sparse_conv2d.module import PackedConv2d
from clicktrain.methods import ClickTrain, Pruner


def attach(
    optimizer_name: str, packed: bool, **settings: Any
) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    model, optimizer = make(optimizer=optimizer_name)
    method = ClickTrain(compression=5, **settings)
    return model, optimizer, method.attach(model, optimizer, epochs=2, steps_per_epoch=10, packed=packed)


def packed_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, PackedConv2d)}


@pytest.mark.parametrize("optimizer_name", list(OPTIMIZERS))
def test_a_packed_run_is_the_same_run(optimizer_name: str) -> None:
    results = []
    for packed in (False, True):
        model, optimizer, pruner = attach(optimizer_name, packed)
        model.double()
        for x, y in batches(20):
            loss = F.cross_entropy(model(x.double()), y)
            loss.backward()
            pruner.observe(loss)
            optimizer.step()
            optimizer.zero_grad()
        assert packed_layers(model) == (set(PRUNED) if packed else set())
        pruner.check_zeros()
        assert pruner.finish() is model
        assert not packed_layers(model)
        assert_pruned(model, pruner, 5)
        moments = {
            f"{name} {key}": value
            for name in PRUNED
            for key, value in optimizer.state[model.get_submodule(name).weight].items()
            if isinstance(value, Tensor)
        }
        results.append({**model.state_dict(), **moments})
    dense, packed_run = results
    assert dense.keys() == packed_run.keys()
    for name, value in dense.items():
        torch.testing.assert_close(packed_run[name], value, rtol=1e-7, atol=1e-10, msg=name)


def test_packed_values_are_what_the_optimizer_trains() -> None:
    model, optimizer, pruner = attach("nesterov", packed=True)
    before = {id(p) for p in optimizer.param_groups[0]["params"]}
    train(model, optimizer, pruner, 20)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert {id(p) for p in held} != before
    assert set(optimizer.state) == set(held)
    for name in PRUNED:
        values = model.get_submodule(name).values
        assert values.shape == (pruner.masks[name].shape[0], int(pruner.masks[name][0].sum()))
        assert optimizer.state[values]["momentum_buffer"].shape == values.shape


@pytest.mark.parametrize("attached_packed", [False, True])
def test_finish_gives_the_form_that_is_asked_for(attached_packed: bool) -> None:
    outputs = []
    x, _ = next(batches(1))
    for finish_packed in (False, True):
        model, optimizer, pruner = attach("nesterov", attached_packed)
        train(model, optimizer, pruner, 20)
        pruner.finish(packed=finish_packed)
        assert packed_layers(model) == (set(PRUNED) if finish_packed else set())
        outputs.append(model.eval()(x))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("optimizer_name", ["nesterov", "adamw"])
def test_a_packed_run_goes_on_from_a_saved_state(optimizer_name: str) -> None:
    """Load the pruner first, then weights and optimizer state."""
    model, optimizer, pruner = attach(optimizer_name, packed=True)
    saved: list[Any] = []

    def save(_: int) -> None:
        saved.append(copy.deepcopy((pruner.state_dict(), model.state_dict(), optimizer.state_dict())))

    train(model, optimizer, pruner, 20, after_step=save)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for done in (2, 7, 9, 11, 12, 15, 19):
        state, weights, moments = saved[done - 1]
        model, optimizer, again = attach(optimizer_name, packed=True)
        again.load_state_dict(state)
        model.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        train(model, optimizer, again, 20, start=done)
        assert_same(dict(model.state_dict()), expected)


@pytest.mark.parametrize("saved_packed", [False, True])
def test_going_on_in_the_other_form_keeps_the_zeros(saved_packed: bool) -> None:
    model, optimizer, pruner = attach("nesterov", saved_packed)
    train(model, optimizer, pruner, 15)
    assert pruner.frozen
    states = copy.deepcopy((pruner.state_dict(), model.state_dict(), optimizer.state_dict()))

    model, optimizer, again = attach("nesterov", not saved_packed)
    again.load_state_dict(states[0])
    model.load_state_dict(states[1])
    optimizer.load_state_dict(states[2])
    train(model, optimizer, again, 20, start=15)
    again.finish()
    assert not packed_layers(model)
    assert_pruned(model, again, 5)


@pytest.mark.filterwarnings("ignore:the loop ended after")
def test_a_run_that_stops_early_ends_in_the_form_asked_for() -> None:
    for stop in (0, 3, 8):
        model, optimizer, pruner = attach("adamw", packed=True)
        train(model, optimizer, pruner, stop)
        pruner.finish()
        assert not packed_layers(model)
        assert_pruned(model, pruner, 5)


def test_a_layer_that_cannot_be_packed_is_named_before_the_run_begins() -> None:
    """Not at the hard prune, hours into it."""

    def attached(packed: bool) -> tuple[Net, torch.optim.Optimizer, Pruner]:
        model = Net()
        model.deep = nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular")
        optimizer = OPTIMIZERS["nesterov"](model.parameters())
        method = ClickTrain(compression=5)
        return model, optimizer, method.attach(model, optimizer, epochs=1, steps_per_epoch=10, packed=packed)

    with pytest.warns(UserWarning, match="deep trains masked and dense, not packed: padding_mode"):
        model, optimizer, pruner = attached(True)
    train(model, optimizer, pruner, 10)
    assert packed_layers(model)
    assert "deep" not in packed_layers(model)
    pruner.finish()
    assert not packed_layers(model)
    assert_pruned(model, pruner, 5)
    model, optimizer, pruner = attached(False)
    train(model, optimizer, pruner, 10)
    assert_pruned(model, pruner, 5)
    assert conv_weights(model)["deep"].count_nonzero() > 0


def test_a_network_of_which_nothing_can_be_packed_is_refused() -> None:
    circular = {"padding": 1, "padding_mode": "circular"}
    model = nn.Sequential(nn.Conv2d(3, 8, 3, **circular), nn.Conv2d(8, 8, 3, **circular))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="cannot be packed: padding_mode='circular'"):
        ClickTrain(compression=2).attach(model, optimizer, epochs=1, steps_per_epoch=10, packed=True)
