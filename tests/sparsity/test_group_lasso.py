"""The penalty, its gradient and the proximal step (autograd comparison in tests/papers)."""

from __future__ import annotations

import pytest
import torch

from clicktrain.sparsity.group_lasso import add_lasso_gradient_, group_norms, lasso_penalty, shrink_groups_


def case() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 4, 3, 3, generator=generator, dtype=torch.float64)
    mask = torch.rand(5, 4, 3, 3, generator=generator) < 0.4
    mask[0, 0], mask[1, 1] = False, True
    weight[2, 2] = 0
    return weight, mask


def test_norms_by_hand() -> None:
    weight = torch.tensor([[[[3.0, 9.0], [4.0, 9.0]], [[1.0, 1.0], [1.0, 1.0]]]])
    mask = torch.tensor([[[[False, True], [False, True]], [[False, False], [False, False]]]])
    assert group_norms(weight, mask).tolist() == [[5.0, 2.0]]
    assert lasso_penalty(weight, mask).item() == 7.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_of_tiny_and_of_zero_groups_is_finite(dtype: torch.dtype) -> None:
    weight = torch.zeros(1, 3, 1, 2, dtype=dtype)
    weight[0, 1] = 1e-18
    weight[0, 2] = 1e-30  # its square underflows in float32
    grad = torch.zeros_like(weight)
    add_lasso_gradient_(grad, weight, torch.zeros_like(weight, dtype=torch.bool), 0.00025)
    assert grad[0, 0].eq(0).all()
    assert grad.isfinite().all()
    assert float(grad[0, 1].norm()) == pytest.approx(0.00025, rel=1e-5)
    assert (grad.abs() <= 0.00025).all()


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_proximal_steps_reach_exactly_zero_in_time_and_leave_the_kept_alone(steps: int) -> None:
    weight, mask = case()
    before = weight.clone()
    norms = group_norms(weight, mask)
    for done in range(steps):
        shrink_groups_(weight, mask, steps - done)
        expected = (norms - norms.max() * (done + 1) / steps).clamp_min(0)
        torch.testing.assert_close(group_norms(weight, mask), expected, atol=1e-12, rtol=1e-9)
    assert weight[~mask].eq(0).all()
    assert torch.equal(weight[mask], before[mask])


def test_a_proximal_step_keeps_directions_and_takes_the_same_from_every_norm() -> None:
    weight, mask = case()
    before, norms = weight.clone(), group_norms(weight, mask)
    shrink_groups_(weight, mask, 10)
    lost = (norms - group_norms(weight, mask))[norms > norms.max() / 10]
    torch.testing.assert_close(lost, torch.full_like(lost, float(norms.max()) / 10))
    assert (weight * before >= 0).all()


def test_nothing_to_shrink_is_no_error() -> None:
    weight = torch.ones(2, 2, 3, 3)
    shrink_groups_(weight, torch.ones_like(weight, dtype=torch.bool), 1)
    assert weight.eq(1).all()
