"""The dense weight of a packed layer: to be read, with gradients, never written."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain import UserError
from clicktrain.kernels.sparse_conv2d import PackedConv2d


@pytest.fixture
def pair() -> tuple[PackedConv2d, nn.Conv2d]:
    conv = nn.Conv2d(4, 6, 3, padding=1)
    mask = torch.rand(conv.weight.shape) < 0.4
    with torch.no_grad():
        conv.weight *= mask
    return PackedConv2d.from_dense(copy.deepcopy(conv), mask), conv


def test_losses_and_networks_may_read_it(pair: tuple[PackedConv2d, nn.Conv2d]) -> None:
    packed, dense = pair
    x = torch.randn(2, 4, 5, 5)
    for layer in pair:
        w: Tensor = layer.weight
        y = F.conv2d(x, w - w.mean((1, 2, 3), keepdim=True), layer.bias, padding=1)
        (y.square().sum() + (w.flatten(1) @ w.flatten(1).T).square().sum()).backward()
    kept = dense.weight != 0
    gradient = packed.weight.grad
    assert gradient is not None
    assert dense.weight.grad is not None
    torch.testing.assert_close(gradient, dense.weight.grad * kept)
    assert type(packed.weight * 2) is Tensor
    assert packed.weight.shape == dense.weight.shape
    names = ("out_channels", "in_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    for name in (*names, "padding_mode", "transposed", "output_padding"):
        assert getattr(packed, name) == getattr(dense, name)


def test_it_is_no_parameter(pair: tuple[PackedConv2d, nn.Conv2d]) -> None:
    packed, dense = pair
    assert list(packed.state_dict()) == ["values", "bias", "keep_bits"]
    assert [name for name, _ in packed.named_parameters()] == ["values", "bias"]
    file = io.BytesIO()
    torch.save({"w": packed.weight}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["w"]
    assert type(loaded) is Tensor
    assert torch.equal(loaded, dense.weight)
    assert type(copy.deepcopy(packed.weight)) is Tensor


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.data.copy_(torch.zeros(6, 4, 3, 3)),
        lambda layer: layer.weight.detach().zero_(),
        lambda layer: layer.weight.__setitem__(0, 1),
        lambda layer: nn.init.kaiming_normal_(layer.weight),
        lambda layer: layer.weight.requires_grad_(False),
        lambda layer: torch.mul(layer.weight, 2, out=layer.weight),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(6, 4, 3, 3))),
        lambda layer: layer.weight.__iadd__(1),
    ],
)
def test_writing_is_refused(
    pair: tuple[PackedConv2d, nn.Conv2d], write: Callable[[nn.Module], object]
) -> None:
    before = pair[0].values.detach().clone()
    with torch.no_grad(), pytest.raises(UserError, match="can be read but not written"):
        write(pair[0])
    assert torch.equal(pair[0].values, before)
