"""Averages of the weights are masked, shrunk and packed with the network, after one call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_loops import METHODS_MADE, Net, attached, batch, network, sgd, train
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

from clicktrain.errors import UserError
from clicktrain.methods import ClickTrain, PaT, Pruner
from clicktrain.train.averages import make_average

AVERAGES: dict[str, Callable[[nn.Module], AveragedModel]] = {
    "ema": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    "ema, buffers": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "swa": lambda m: AveragedModel(m, multi_avg_fn=get_swa_multi_avg_fn()),
    "plain": AveragedModel,
    "trainer's": lambda m: make_average(m, 0.9),
}


def shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in model.named_parameters()]


def assert_follows(average: AveragedModel, model: nn.Module, pruner: Pruner) -> None:
    assert shapes(average.module) == shapes(model)
    for name, mask in pruner.masks.items():
        weight = average.module.get_submodule(name).weight
        assert bool((weight[~mask] == 0).all()), name
        assert bool((weight[mask] != 0).all()), name


@pytest.mark.parametrize("packed", [False, True], ids=["masked", "packed"])
@pytest.mark.parametrize(
    ("kind", "method"),
    [("ema, buffers", method) for method in METHODS_MADE]
    + [(kind, method) for kind in AVERAGES if kind != "ema, buffers" for method in ("clicktrain", "pat")],
)
def test_every_average_by_every_method(kind: str, method: str, packed: bool) -> None:
    model = network()
    pruner = attached(METHODS_MADE[method](), model, sgd(model), packed=packed)
    average = AVERAGES[kind](model)
    pruner.follow(average)
    pruner.follow(average)  # once more changes nothing

    def step(number: int) -> None:
        average.update_parameters(model)
        assert shapes(average.module) == shapes(model)
        if number % 5 == 0:
            assert bool(average(batch(99)[0]).isfinite().all())

    train(model, pruner, after_step=step)
    pruner.finish()
    assert_follows(average, model, pruner)
    update_bn([batch(number)[0] for number in range(2)], average)


@pytest.mark.parametrize("packed", [False, True], ids=["masked", "packed"])
@pytest.mark.parametrize(
    "method",
    [
        "clicktrain",
        "prunetrain",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("pat", "campfire")),
    ],
)
@pytest.mark.parametrize("made_at", [-1, 3, 20])
@pytest.mark.parametrize("followed_at", [3, 12, 20])
def test_at_what_moment_it_is_made_and_followed(
    made_at: int, followed_at: int, method: str, packed: bool
) -> None:
    """Made before attach (-1) or at any time after it, and followed then or later."""
    if made_at > followed_at:
        pytest.skip("an average is made before it is followed")
    model = network()
    average = AveragedModel(model) if made_at < 0 else None
    pruner = attached(METHODS_MADE[method](), model, sgd(model), packed=packed)
    for number in range(24):
        if number == made_at:
            average = AveragedModel(model)
        if number == followed_at:
            assert average is not None
            pruner.follow(average)
        train(model, pruner, batches=range(number, number + 1))
        if average is not None and number >= followed_at:
            average.update_parameters(model)
    pruner.finish(packed=packed)
    assert average is not None
    assert shapes(average.module) == shapes(model)
    if not packed:
        assert_follows(average, model, pruner)


def test_the_average_is_that_of_a_masked_network() -> None:
    """Followed through packing and unpacking it has the numbers that it has without packing."""
    results: list[dict[str, Tensor]] = []
    for packed in (False, True):
        model = network().double()
        pruner = attached(ClickTrain(compression=3), model, sgd(model), packed=packed)
        average = AVERAGES["ema, buffers"](model)
        pruner.follow(average)
        for number in range(24):
            x, y = batch(number)
            loss = nn.functional.cross_entropy(model(x.double()), y)
            loss.backward()
            pruner.observe(loss)
            pruner.optimizer.step()
            pruner.optimizer.zero_grad()
            average.update_parameters(model)
        pruner.finish()
        results.append(average.module.state_dict())
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("packed", [False, True], ids=["masked", "packed"])
@pytest.mark.parametrize("method", ["clicktrain", "pat", "rigl"])
@pytest.mark.parametrize("made_at", [0, 10, 21])
def test_an_average_made_after_attach_is_found(made_at: int, method: str, packed: bool) -> None:
    """Without a call; and no other copy of the network is touched."""
    model = network()
    pruner = attached(METHODS_MADE[method](), model, sgd(model), packed=packed)
    average, other, before = None, None, {}
    for number in range(24):
        if number == made_at:
            average, other = AveragedModel(model), copy.deepcopy(model)
            before = {name: value.clone() for name, value in other.state_dict().items()}
        train(model, pruner, batches=range(number, number + 1))
        if average is not None:
            average.update_parameters(model)
    pruner.finish()
    assert average is not None
    assert other is not None
    assert_follows(average, model, pruner)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    left = {name: value for name, value in vars(model).items() if "clicktrain" in name}
    assert left.keys() == ({"_clicktrain_plans"} if pruner.plans else set()), "nothing else is left"
    assert all(type(text) is str for texts in left.values() for text in texts), "and no object of ours"


class Ema(nn.Module):
    """As timm's ModelEmaV2: a module that holds the copy as ``module``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for mine, its in zip(self.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(mine * 0.9 + 0.1 * its)


def test_averages_of_other_people() -> None:
    model = network()
    ema, plain = Ema(model), copy.deepcopy(model)
    pruner = attached(PaT(policy="epoch", prune_epoch=1, prune_ratio=0.3), model, sgd(model))
    pruner.follow(ema)
    pruner.follow(plain)
    train(model, pruner, after_step=lambda _: ema.update(model))
    pruner.finish()
    assert shapes(ema.module) == shapes(plain) == shapes(model)
    assert pruner.plans


def test_what_cannot_be_followed() -> None:
    model = network()
    pruner = attached(ClickTrain(compression=3), model, sgd(model))
    odd: list[tuple[Any, str]] = [
        ([p.clone() for p in model.parameters()], "not a list"),
        (nn.Linear(3, 3), "not a Linear"),
        (AveragedModel(Net(width=16)), "not a copy of the network that is attached"),
        (model, "not the network itself"),
        (None, "not a NoneType"),
    ]
    for average, sentence in odd:
        with pytest.raises(UserError, match=sentence):
            pruner.follow(average)
    with pytest.raises(UserError, match=r"not an AveragedModel of it.*pruner\.follow"):
        attached(ClickTrain(compression=3), AveragedModel(model), sgd(model))
