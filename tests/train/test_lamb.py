"""LAMB against its algorithm in plain numbers, and in a run whose layers are packed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import FIVE_STAGES, At, Killed, assert_same_run, kill, resume, run
from torch import nn

from clicktrain.accounting.memory import optimizer_bytes
from clicktrain.errors import UserError
from clicktrain.train import RunConfig
from clicktrain.train.lamb import Lamb
from clicktrain.train.optim import make_optimizer


class Reference:
    """You et al. 2020, Algorithm 2, for one parameter as a list of numbers."""

    def __init__(
        self, x: list[float], lr: float, betas: tuple[float, float], eps: float, decay: float
    ) -> None:
        self.x, self.lr, self.betas, self.eps, self.decay = x, lr, betas, eps, decay
        self.m, self.v, self.t = [0.0] * len(x), [0.0] * len(x), 0

    def step(self, gradient: list[float], adapt: bool = True) -> None:
        self.t += 1
        one, two = self.betas
        update = []
        for i, g in enumerate(gradient):
            self.m[i] = one * self.m[i] + (1 - one) * g
            self.v[i] = two * self.v[i] + (1 - two) * g * g
            m, v = self.m[i] / (1 - one**self.t), self.v[i] / (1 - two**self.t)
            update.append(m / (math.sqrt(v) + self.eps) + self.decay * self.x[i])
        norm, length = (math.sqrt(sum(value**2 for value in values)) for values in (self.x, update))
        ratio = norm / length if adapt and norm and length else 1.0
        self.x = [x - self.lr * ratio * u for x, u in zip(self.x, update, strict=True)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("adapt", [True, False])
def test_each_step_is_that_of_the_algorithm(adapt: bool, decay: float) -> None:
    torch.manual_seed(0)
    parameters = [
        nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((3, 4), (5,), (2, 2, 2))
    ]
    parameters.append(nn.Parameter(torch.zeros(3, dtype=torch.float64)))  # begins with a norm of zero
    unused = nn.Parameter(torch.ones(2))
    optimizer = Lamb([*parameters, unused], 0.05, (0.8, 0.95), 1e-6, decay, adapt)
    references = [Reference(p.flatten().tolist(), 0.05, (0.8, 0.95), 1e-6, decay) for p in parameters]
    for step in range(6):
        for parameter, reference in zip(parameters, references, strict=True):
            gradient = torch.randn_like(parameter) if step != 3 else torch.zeros_like(parameter)
            parameter.grad = gradient
            reference.step(gradient.flatten().tolist(), adapt)
        optimizer.step()
        for parameter, reference in zip(parameters, references, strict=True):
            assert parameter.flatten().tolist() == pytest.approx(reference.x, rel=1e-9, abs=1e-12)
    assert torch.equal(unused, torch.ones(2))
    assert unused not in optimizer.state


def test_memory_counts_its_state_before_the_first_step() -> None:
    model = nn.Linear(30, 20)
    optimizer = Lamb(model.parameters())
    planned = optimizer_bytes(optimizer)
    model(torch.ones(2, 30)).sum().backward()
    optimizer.step()
    held = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step")
    assert planned == held == 2 * 4 * (30 * 20 + 20)


def test_norms_and_biases_take_plain_steps_where_they_do_not_decay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    config = RunConfig(optimizer="lamb", learning_rate=0.01, decay_norm_and_bias=False)
    made = make_optimizer(model, config)
    assert type(made) is Lamb
    weights, others = made.param_groups
    assert (weights["adapt"], weights["weight_decay"], weights["betas"]) == (True, 5e-4, (0.9, 0.999))
    assert (others["adapt"], others["weight_decay"]) == (False, 0.0)
    (every,) = make_optimizer(model, RunConfig(optimizer="lamb")).param_groups
    assert every["adapt"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lr": -1.0}, "lr of LAMB is -1.0: must be at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas of LAMB are \(0.9, 1.0\): must be at least 0 and below 1"),
    ],
)
def test_impossible_settings_are_named(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Lamb([nn.Parameter(torch.zeros(2))], **settings)


def test_masked_and_packed_weights_have_the_same_steps() -> None:
    """Zeros outside of a mask change no norm."""
    torch.manual_seed(1)
    mask = torch.rand(6, 5) < 0.4
    values = torch.randn(6, 5) * mask
    dense, packed = nn.Parameter(values.clone()), nn.Parameter(values[mask])
    both = [Lamb([p], lr=0.1, weight_decay=0.05) for p in (dense, packed)]
    for _ in range(5):
        gradient = torch.randn(6, 5) * mask
        dense.grad, packed.grad = gradient, gradient[mask]
        for optimizer in both:
            optimizer.step()
    torch.testing.assert_close(dense[mask], packed)


@pytest.mark.long
def test_a_run_goes_on_bit_for_bit_before_and_after_packing(tmp_path: Path) -> None:
    settings = {**FIVE_STAGES, "optimizer": "lamb", "learning_rate": 0.02, "decay_norm_and_bias": False}
    assert run(tmp_path / "whole", settings)["val_accuracy"] > 60
    for batch in (26, 60):
        with pytest.raises(Killed):
            run(tmp_path / f"at-{batch}", settings, At(batch, kill))
        resume(tmp_path / f"at-{batch}")
        assert_same_run(tmp_path / "whole", tmp_path / f"at-{batch}")
