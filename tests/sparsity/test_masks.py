"""Hard prune, masked optimizer state, energy outside a mask."""

from __future__ import annotations

import pytest
import torch

from clicktrain.sparsity.masks import energy_outside, hard_prune_, mask_optimizer_state_

MASK = torch.tensor([[[[True, False], [False, True]]]])


def test_hard_prune_writes_zeros_outside_and_nothing_inside() -> None:
    weight = torch.tensor([[[[1.0, float("nan")], [-3.0, 4.0]]]])
    hard_prune_(weight, MASK)
    assert weight.tolist() == [[[[1.0, 0.0], [0.0, 4.0]]]]


@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam", "adamw", "amsgrad", "rmsprop", "adagrad"])
def test_no_optimizer_moves_a_pruned_weight_again(name: str) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0)))
    mask = torch.rand(3, 2, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.5
    optimizer: torch.optim.Optimizer = {
        "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
        "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
        "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=1e-2),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
        "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    }[name]([weight])

    def step(masked: bool) -> None:
        optimizer.zero_grad()
        (weight - 1).square().sum().backward()
        assert weight.grad is not None
        if masked:
            weight.grad.masked_fill_(~mask, 0.0)
        optimizer.step()

    for _ in range(3):
        step(masked=False)
    with torch.no_grad():
        hard_prune_(weight, mask)
    mask_optimizer_state_(optimizer, weight, mask)
    before = weight.detach().clone()
    for _ in range(20):
        step(masked=True)
    assert weight[~mask].eq(0).all()
    assert (weight[mask] != before[mask]).all()


def test_an_optimizer_without_state_is_left_alone() -> None:
    weight = torch.nn.Parameter(torch.ones(1, 1, 2, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    mask_optimizer_state_(optimizer, weight, MASK)
    assert not optimizer.state


def test_energy_by_hand() -> None:
    weight = torch.nn.Parameter(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    assert energy_outside(weight, MASK) == (13.0, 30.0)
