"""Layers on activations with the batch innermost, against PyTorch's own on [N, C, H, W]."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.kernels.layouts import LAYOUTS
from clicktrain.kernels.max_pool2d import Pooling

LAYOUT = LAYOUTS["batch_innermost"]


def inside(x: Tensor) -> Tensor:
    return LAYOUT.enter(x.dtype)(x)


def test_conversions_and_views() -> None:
    x = torch.randn(3, 2, 4, 5)
    y = inside(x)
    assert y.shape == (2, 4, 5, 3)
    assert y.is_contiguous()
    assert torch.equal(LAYOUT.leave(y, 3), x)
    assert LAYOUT.images is not None
    assert torch.equal(LAYOUT.images(y), x)
    assert LAYOUT.view is not None
    view, back = LAYOUT.view
    assert view(y).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(LAYOUT.leave(back(F.avg_pool2d(view(y), 2), y), 3), F.avg_pool2d(x, 2))
    assert LAYOUT.image_mean is not None
    torch.testing.assert_close(LAYOUT.image_mean(y, 3, True, x.dtype), x.mean((2, 3), keepdim=True))
    torch.testing.assert_close(LAYOUT.image_mean(y, 3, False, x.dtype), x.mean((2, 3)))


def test_pooling_and_activations() -> None:
    x, bias = torch.randn(3, 2, 5, 6), torch.randn(2)
    assert LAYOUT.max_pool is not None
    y = LAYOUT.max_pool(inside(x), Pooling(3, (2, 1), 1, 1, True))
    assert torch.equal(LAYOUT.leave(y, 3), F.max_pool2d(x, 3, (2, 1), 1, 1, True))
    assert LAYOUT.activation is not None
    y = LAYOUT.activation(inside(x), 3, "gelu", bias)
    torch.testing.assert_close(LAYOUT.leave(y, 3), F.gelu(x + bias[:, None, None]))


@pytest.mark.parametrize("given", [False, True], ids=["taken", "known"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_and_its_gradients(training: bool, affine: bool, given: bool) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, affine=affine, momentum=None if affine else 0.3, dtype=torch.float64)
    norm.running_mean.normal_()  # type: ignore[union-attr]
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm.train(training)
    twin = copy.deepcopy(norm)
    x, residual = (torch.randn(3, 4, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y = torch.relu(norm(x) + residual)
    variance, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
    statistics = (mean, variance) if given else None
    assert LAYOUT.batch_norm is not None
    mine = LAYOUT.batch_norm(inside(x), twin, 3, inside(residual), "relu", statistics, None)
    torch.testing.assert_close(LAYOUT.leave(mine, 3), y)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(twin.get_buffer(name), buffer)
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, [x, residual, *norm.parameters()], grad)
    got = torch.autograd.grad(mine, [x, residual, *twin.parameters()], inside(grad))
    torch.testing.assert_close(got, expected)


def test_batch_norm_of_maxima_in_half_precision() -> None:
    norm, x = nn.BatchNorm2d(4), torch.randn(3, 4, 4, 4)
    assert LAYOUT.batch_norm is not None
    y = LAYOUT.batch_norm(inside(x.bfloat16()), copy.deepcopy(norm), 3, None, "none", None, Pooling(2))
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(LAYOUT.leave(y, 3).float(), norm(F.max_pool2d(x, 2)), rtol=0.02, atol=0.02)
