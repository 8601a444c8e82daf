"""PruneTrain with a target: met with any optimizer, never overshot, and every layer keeps its floor."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain import PruneTrain, create_model
from clicktrain.accounting import count
from clicktrain.errors import MissedTarget, UserError
from clicktrain.methods import ChannelsThenPatterns, Pruner
from clicktrain.methods.base import RunLength
from clicktrain.methods.channels.costs import ChannelCosts, CostMeter
from clicktrain.methods.channels.steering import wanted_share
from clicktrain.methods.driver.optimizers import AttachedOptimizers
from clicktrain.sparsity.channel_lasso import measured_step
from clicktrain.surgery import apply_surgery_, channel_groups, plan_from_keep
from clicktrain.train.lamb import Lamb

STEPS, EPOCHS = 3, 6
EXAMPLE = torch.zeros(1, 3, 8, 8)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=3e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


def network(name: str = "resnet8", width: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    return create_model(name, num_classes=4, in_channels=3, width=width, stem="cifar")


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    y = torch.randint(0, 4, (8,), generator=generator)
    return torch.randn(8, 3, 8, 8, generator=generator) + y.view(8, 1, 1, 1) * 0.5, y


def train(pruner: Pruner, first: int = 0, last: int = EPOCHS * STEPS) -> Pruner:
    for number in range(first, last):
        x, y = batch(number)
        loss = F.cross_entropy(pruner.model(x), y)
        loss.backward()
        pruner.observe(loss)
        pruner.optimizer.step()
        pruner.optimizer.zero_grad()
    return pruner


def attach(model: nn.Module, optimizer: str = "sgd", epochs: int = EPOCHS, **settings: Any) -> Pruner:
    return PruneTrain(**settings).attach(
        model,
        OPTIMIZERS[optimizer](model.parameters()),
        epochs=epochs,
        steps_per_epoch=STEPS,
        example=EXAMPLE,
    )


def flops_left(model: nn.Module, before: nn.Module) -> float:
    return count(model, EXAMPLE, {}).forward_flops / count(before, EXAMPLE, {}).forward_flops


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "name",
    [name if name in ("sgd", "adamw") else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS],
)
def test_the_default_target_is_met_with_any_optimizer(name: str) -> None:
    model = network()
    before = copy.deepcopy(model)
    pruner = train(attach(model, name))
    pruner.finish()
    assert flops_left(model, before) == pytest.approx(0.6, abs=0.03)
    assert flops_left(model, before) >= 0.6 - 1e-3
    (row,) = pruner.outcome().targets
    assert row.reached == pytest.approx(flops_left(model, before))
    assert pruner.outcome().warnings == ()


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"target_flops": 0.4},
        {"target_flops": 0.85, "scheme": "gating"},
        {"target_flops": 0.6, "preset": "paper"},
        {"target_flops": 0.6, "coefficient": 0.5},
        {"target_flops": 0.6, "sides": "both", "floor": 0.3},
        {"target_flops": 0.6, "reconfigure": "end"},
        {"target_flops": 0.6, "reconfigure": "once", "once_at": 3},
    ],
    ids=["strong", "gating", "paper", "overwhelming", "both", "end", "once"],
)
def test_removal_stops_at_the_target(settings: dict[str, Any]) -> None:
    model = network()
    before = copy.deepcopy(model)
    shares: list[float] = []
    pruner = attach(model, **settings)
    for number in range(0, EPOCHS * STEPS, STEPS):
        train(pruner, number, number + STEPS)
        shares.append(flops_left(model, before))
    pruner.finish()
    shares.append(flops_left(model, before))
    assert min(shares) >= settings["target_flops"] - 1e-3
    assert shares[-1] == pytest.approx(settings["target_flops"], abs=0.05)
    assert shares == sorted(shares, reverse=True)


def test_a_share_of_the_parameters() -> None:
    model = network("vgg11", 0.125)
    before = parameters(model)
    train(attach(model, target_parameters=0.5)).finish()
    assert parameters(model) / before == pytest.approx(0.5, abs=0.01)


def test_every_layer_keeps_its_floor() -> None:
    model = network("vgg11", 0.125)
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    train(attach(model, target_flops=0.35, floor=0.4)).finish()
    now = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(n >= math.ceil(0.4 * w) for n, w in zip(now, widths, strict=True))
    assert sum(now) < sum(widths)


def test_widths_in_multiples_are_counted() -> None:
    model = network("vgg11", 0.125)
    before = copy.deepcopy(model)
    train(attach(model, target_flops=0.5, round_to=4)).finish()
    assert all(m.out_channels % 4 == 0 for m in model.modules() if isinstance(m, nn.Conv2d))
    assert 0.5 - 1e-3 <= flops_left(model, before) <= 0.55


@pytest.mark.long
@pytest.mark.parametrize("stop", [7, STEPS * 4])
def test_a_saved_state_goes_on_bit_for_bit(stop: int) -> None:
    whole = train(attach(network(), "adamw"))
    first = train(attach(network(), "adamw"), 0, stop)
    second = attach(network(), "adamw")
    second.load_state_dict(first.state_dict())
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    train(second, stop)
    assert second.state_dict()["state"]["target"].keys() == whole.state_dict()["state"]["target"].keys()
    one, two = whole.finish().state_dict(), second.finish().state_dict()
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_when_there_is_a_target() -> None:
    assert PruneTrain().target == ("flops", 0.6)
    assert PruneTrain(target_parameters=0.5).target == ("parameters", 0.5)
    assert PruneTrain(penalty_ratio=0.25).target is None  # the paper's: what comes out comes out
    assert PruneTrain(coefficient=1e-3).target is None
    assert PruneTrain(preset="paper").target is None
    assert PruneTrain(target_flops=0.5, penalty_ratio=0.1).target == ("flops", 0.5)
    assert ChannelsThenPatterns().first.target == ("flops", 0.6)
    assert ChannelsThenPatterns(penalty_ratio=0.25).first.target is None
    assert PruneTrain().target_epoch(RunLength(24, 11)) == 18
    assert PruneTrain(fine_tune=10).target_epoch(RunLength(24, 11)) == 14
    assert ChannelsThenPatterns().first_of(RunLength(20, 5)).target_epoch(RunLength(20, 5)) == 8


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_flops": 0.5, "target_parameters": 0.5}, "both given"),
        ({"target_flops": 60.0}, "share that is left"),
        ({"target_flops": 0.0}, "share that is left"),
        ({"penalty_ratio": 0.2, "target_at": 3.0}, "there is no target"),
        ({"floor": 1.0}, "floor must be"),
        ({"target_flops": 0.01}, "0.01 of the inference FLOPs, but with 0.1 of each layer's channels"),
        ({"target_flops": 0.5, "target_at": 9.0}, "target_at is 9 but the run has 6 epochs"),
    ],
)
def test_mistakes_are_told_before_the_run(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        attach(network(), **settings)


def test_costs_are_what_the_smaller_network_is_counted_at() -> None:
    model = network()
    for what in ("flops", "parameters"):
        costs = ChannelCosts(model, EXAMPLE, channel_groups(model, EXAMPLE), what)  # type: ignore[arg-type]
        keep, meter = {}, CostMeter(costs)
        for number, group in enumerate(costs.groups):
            if group.fixed is None:
                keep[group.name] = torch.arange(group.size) >= 2
                for channel in range(2):
                    promised = meter.would_be(number, channel)
                    meter.remove(number, channel)
                    assert meter.cost == pytest.approx(promised)
        plan = plan_from_keep(model, EXAMPLE, keep)
        smaller = copy.deepcopy(model)
        apply_surgery_(plan, smaller)
        truth = parameters(smaller) if what == "parameters" else count(smaller, EXAMPLE, {}).forward_flops
        assert costs.after(plan) == pytest.approx(truth)
        assert meter.cost == pytest.approx(truth)


def test_a_measured_step_of_sgd_is_its_learning_rate() -> None:
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.3)
    weight.grad = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    before, gradient = weight.detach().clone(), weight.grad.square().sum()
    optimizer.step()
    moved = (weight.detach() - before).square().sum()
    assert float(measured_step(moved, gradient, 0.0, 8)) == pytest.approx(0.3)
    strong = float(measured_step(moved, gradient, 1e6, 4))
    assert 1e6 * strong * 2 == pytest.approx(float(moved.sqrt()))  # never more than the step itself


def test_a_fixed_penalty_shrinks_with_an_adaptive_optimizer_too() -> None:
    """Its steps are about the learning rate whatever the gradient is: so must the lasso's be."""
    norms = {}
    for coefficient in (1e-9, 1.0):  # times the learning rate it would take 2% off the norms
        model = network()
        train(attach(model, "adamw", coefficient=coefficient), 0, 3 * STEPS)
        norms[coefficient] = sum(
            float(m.weight.detach().norm()) for m in model.modules() if isinstance(m, nn.Conv2d)
        )
    assert norms[1.0] < 0.9 * norms[1e-9]


@pytest.mark.parametrize(
    ("make", "scaled"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), False),
        (lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=5.0), False),
        (lambda p: torch.optim.RMSprop(p), False),
        (lambda p: Lamb(p, lr=0.1), True),
        (lambda p: torch.optim.Adafactor(p, lr=0.1), True),
    ],
)
def test_whose_steps_are_as_large_as_the_weights(make: Callable[[Any], Any], scaled: bool) -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    attached = AttachedOptimizers(make(model.parameters()))
    assert attached.scale_with_weights(attached.units) is scaled
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(("rate", "warned"), [(0.02, True), (5.0, False)])
def test_steps_too_weak_for_the_lasso_are_warned_of(rate: float, warned: bool) -> None:
    """12 steps until the target move weights by 0.24 times their size, or by 60 times."""
    model = network()
    optimizer = Lamb(model.parameters(), lr=rate)
    pruner = PruneTrain().attach(model, optimizer, epochs=6, steps_per_epoch=STEPS, example=EXAMPLE)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(pruner, 0, STEPS + 1)
    pruner.close()
    found = [str(one.message) for one in said if "in proportion to the weights" in str(one.message)]
    assert len(found) == warned
    if warned:
        assert re.search(r"they move weights by 0\.\d+ times their size", found[0])


def test_what_is_wanted_falls_in_a_line() -> None:
    assert [round(wanted_share(0.6, epoch, 18), 3) for epoch in (0, 6, 12, 18, 20)] == [1, 1, 0.8, 0.6, 0.6]


def test_patterns_take_what_the_channels_left_can_give() -> None:
    """Narrow layers cannot be compressed as far as wide ones."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    method = ChannelsThenPatterns(target_parameters=0.15, floor=0.05, switch_at=3, pattern_compression=12.0)
    pruner = method.attach(model, optimizer, epochs=EPOCHS, steps_per_epoch=STEPS, example=EXAMPLE)
    train(pruner)
    with pytest.warns(MissedTarget, match="compression of convolution weights that are left: asked 12.00x"):
        pruner.finish()
    (row,) = [row for row in pruner.outcome().targets if "that are left" in row.what]
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    kept = sum(int(weight.count_nonzero()) for weight in weights)
    assert row.reached == pytest.approx(sum(weight.numel() for weight in weights) / kept)
    assert row.asked == 12.0
    assert row.reached < 11
    assert "at the most" in row.reason
    assert pruner.state_dict()["state"]["compression"] == pytest.approx(row.reached, rel=0.05)
