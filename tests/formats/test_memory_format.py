"""Convolutions that oneDNN gets wrong in channels_last: guarded, they give the gradients of float64.

Without the guard these tests do not fail, they crash: the library writes past the end of its memory.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.formats.memory_format import keep_out_of_channels_last_, plain, unsafe_in_channels_last


def _near_float64(conv: nn.Conv2d, x: Tensor) -> None:
    y = conv(x)
    gy = torch.randn_like(y)
    y.backward(gy)
    weight = conv.weight.detach().double().requires_grad_()
    F.conv2d(x.double(), weight, stride=conv.stride).backward(gy.double())
    assert conv.weight.grad is not None
    assert weight.grad is not None
    assert float((conv.weight.grad - weight.grad).abs().max()) <= 1e-5 * float(weight.grad.abs().max())


@pytest.mark.parametrize("channels", [1, 3, 5, 7, 8])
def test_guarded_layers_are_right_in_channels_last(channels: int) -> None:
    torch.manual_seed(0)
    for _ in range(5):
        conv = nn.Conv2d(channels, 16, 1, stride=2, bias=False)
        keep_out_of_channels_last_(conv)
        conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.randn(64, channels, 16, 16).to(memory_format=torch.channels_last)
        _near_float64(conv, x)


def test_only_strided_pointwise_layers_with_few_inputs_are_guarded_and_once() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 64, 1, stride=2),
        nn.Conv2d(64, 8, 1, stride=2),
    )
    assert [unsafe_in_channels_last(m) for m in model] == [False, False, True, False]
    assert keep_out_of_channels_last_(model) == ["2"]
    assert keep_out_of_channels_last_(model) == ["2"]
    assert [len(m._forward_pre_hooks) for m in model] == [0, 0, 1, 0]
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 33, 33)
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("shape", [(2, 1, 4, 4), (2, 5, 1, 1), (2, 5, 4, 3), (1, 1, 1, 1)])
def test_plain_has_the_strides_of_nchw(shape: tuple[int, ...]) -> None:
    want = torch.randn(shape)
    found = plain(want.to(memory_format=torch.channels_last))
    assert found.stride() == want.stride()
    assert torch.equal(found, want)
    assert plain(want) is want
