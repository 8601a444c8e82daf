"""What PruneTrain's section 4 states, against the same in plain loops."""

from __future__ import annotations

import prunetrain_reference as reference
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clicktrain import PruneTrain
from clicktrain.methods.channels.lasso import channel_axes
from clicktrain.sparsity.channel_lasso import (
    add_channel_lasso_gradient_,
    channel_penalty,
    coefficient_for_ratio,
    shrink_channels_,
    zero_small_channels_,
)

LAYERS = ("a", "b", "c", "head")


def chain(seed: int = 0) -> reference.Chain:
    torch.manual_seed(seed)
    return reference.Chain().double()


def images(n: int = 5) -> torch.Tensor:
    return torch.randn(n, 3, 11, 11, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_penalty_and_gradient_are_those_of_autograd(seed: int) -> None:
    model = chain(seed)
    with torch.no_grad():
        model.b.weight[2] = 0.0  # a channel that has reached zero gets no gradient from its own norm
    axes = channel_axes(model, images(1), LAYERS)
    found = sum(channel_penalty(model.get_parameter(f"{name}.weight"), axes[name]) for name in LAYERS)
    expected = reference.penalty(model.convs(), model.head.weight)
    torch.testing.assert_close(found, expected.detach())
    (0.3 * expected).backward()
    for name in LAYERS:
        weight = model.get_parameter(f"{name}.weight")
        grad = torch.zeros_like(weight)
        add_channel_lasso_gradient_(grad, weight.detach(), axes[name], 0.3)
        assert weight.grad is not None
        torch.testing.assert_close(grad, weight.grad.nan_to_num(0.0))


@given(st.floats(0.01, 0.95), st.floats(0.1, 10), st.floats(0.5, 1e4))
def test_the_coefficient_gives_the_ratio(share: float, loss: float, norms: float) -> None:
    coefficient = coefficient_for_ratio(share, loss, norms)
    assert reference.ratio(coefficient, loss, norms) == pytest.approx(share)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_channels_under_the_threshold_are_zeroed(name: str) -> None:
    model = chain()
    weight = model.get_parameter(f"{name}.weight").detach()
    weight[1] *= 1e-5 / weight[1].abs().max()
    weight[:, 2] *= (
        1e-4 / weight[:, 2].abs().max()
    )  # exactly at the threshold, with the tie of a filter above
    weight[3, 0] *= 1e-6  # a small kernel in a living filter stays
    expected = reference.zeroed(weight, 1e-4, inputs=name != "a")
    zero_small_channels_(weight, channel_axes(model, images(1), LAYERS)[name], 1e-4)
    assert torch.equal(weight, expected)


def test_a_proximal_step_shortens_norms_and_stops_at_zero() -> None:
    model = chain()
    axes = channel_axes(model, images(1), LAYERS)["a"]  # filters only
    weight = model.a.weight.detach()
    weight[4] *= 0.01 / weight[4].norm()
    before = weight.flatten(1).norm(dim=1)
    direction = weight[0] / weight[0].norm()
    shrink_channels_(weight, axes, 0.05)
    after = weight.flatten(1).norm(dim=1)
    torch.testing.assert_close(after, (before - 0.05).clamp_min(0))
    assert (weight[4] == 0).all()
    torch.testing.assert_close(weight[0] / weight[0].norm(), direction)


@pytest.mark.parametrize("update", ["gradient", "proximal"])
def test_a_step_of_the_method_by_hand(update: str) -> None:
    """Algorithm 1, lines 9 to 17: lambda from the first losses, then the same lambda in every step."""
    model, by_hand = chain(), chain()
    x, y = images(6), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = PruneTrain(penalty_ratio=0.4, update=update, floor=0.0).attach(  # type: ignore[arg-type]
        model, optimizer, epochs=3, steps_per_epoch=4
    )
    coefficient = 0.0
    for step in range(3):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        pruner.observe(loss)
        optimizer.step()
        optimizer.zero_grad()

        loss = F.cross_entropy(by_hand(x), y)
        lasso = reference.penalty(by_hand.convs(), by_hand.head.weight)
        if step == 0:
            coefficient = coefficient_for_ratio(0.4, float(loss.detach()), float(lasso.detach()))
        if update == "gradient":
            loss = loss + coefficient * lasso
        by_hand.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in by_hand.parameters():
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad
            if update == "proximal":
                for name in LAYERS:
                    weight = by_hand.get_parameter(f"{name}.weight")
                    for dim in (0, 1):
                        if (name, dim) in (("a", 1), ("head", 0)):
                            continue
                        for index in range(weight.shape[dim]):
                            group = weight.select(dim, index)
                            group *= max(0.0, 1 - 0.1 * coefficient / float(group.norm()))
    for (name, found), expected in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found, expected, msg=name, rtol=1e-6, atol=1e-8)


def test_grouped_depthwise_and_flattened_layers_have_the_channels_that_go_together() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),  # depthwise: its filters are the channels that it reads
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 7),
    )
    axes = channel_axes(model, torch.zeros(1, 3, 8, 8), ["0", "2", "4", "7"])
    assert {name: [(axis.dim, axis.count) for axis in own] for name, own in axes.items()} == {
        "0": [(0, 8)],
        "2": [(0, 8)],
        "4": [(0, 4), (1, 8)],
        "7": [(1, 4)],
    }
    (pixels,) = axes["7"]
    assert pixels.channel.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
