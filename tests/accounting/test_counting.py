"""FLOPs and bytes by hand, against PyTorch's own counter, and without a trace left."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clicktrain.accounting import LayerCost, ModelCost, compression_ratio, count
from clicktrain.errors import UserError
from clicktrain.kernels.pack_model import pack, pack_model_
from clicktrain.kernels.sparse_conv2d import PackedLayer
from clicktrain.models import create_model


class Residual(nn.Module):
    """Strided block with a 1x1 shortcut; functional activations and pooling."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups, bias=False)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.shortcut = nn.Conv2d(4, 8, 1, stride=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        y = self.conv2(torch.relu(self.conv1(x)))
        x = (y + self.shortcut(x)).relu()
        z: Tensor = self.fc(x.mean((2, 3)))
        return z


class Reused(nn.Module):
    """One convolution used twice; the first use reads the image, the second does not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.max_pool2d(self.conv(x), 2))
        return y


class TwoInputs(nn.Module):
    """Two branches that both read the image, one of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)
        self.frozen = nn.Conv2d(2, 2, 1).requires_grad_(False)
        self.end = nn.Conv2d(2, 2, 1)
        self.b.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.frozen(self.b(x))
        with torch.no_grad():
            frozen = frozen + self.frozen(self.a(x))
        y: Tensor = self.end(frozen) + self.frozen(self.a(x))
        return y


def three(layer: LayerCost) -> tuple[int, int, int]:
    return layer.forward_flops_dense, layer.grad_input_flops_dense, layer.grad_weight_flops_dense


def only(module: nn.Module, *shape: int) -> LayerCost:
    """Cost of one module, first in its network."""
    (layer,) = count(nn.Sequential(module), torch.zeros(shape)).layers
    return layer


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("module", "shape", "output_hw", "multiply_adds"),
    [
        (nn.Conv2d(3, 5, 3), (2, 3, 8, 9), (6, 7), 5 * 3 * 9 * 6 * 7),
        (nn.Conv2d(3, 5, 3, padding=1), (2, 3, 8, 9), (8, 9), 5 * 3 * 9 * 8 * 9),
        (nn.Conv2d(3, 5, 3, stride=2, padding=1), (2, 3, 8, 9), (4, 5), 5 * 3 * 9 * 4 * 5),
        (nn.Conv2d(3, 5, (3, 1), stride=(1, 2), dilation=2), (1, 3, 8, 9), (4, 5), 5 * 3 * 3 * 4 * 5),
        (nn.Conv2d(3, 5, 3, padding="same"), (3, 3, 8, 9), (8, 9), 5 * 3 * 9 * 8 * 9),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 9), (6, 7), 6 * 2 * 9 * 6 * 7),
        (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 8, 9), (6, 7), 8 * 1 * 9 * 6 * 7),
        (nn.Conv2d(4, 8, 1), (2, 4, 8, 9), (8, 9), 8 * 4 * 8 * 9),
        (nn.Conv1d(4, 8, 3), (2, 4, 9), (7,), 8 * 4 * 3 * 7),
        (nn.ConvTranspose2d(4, 8, 3, stride=2), (2, 4, 5, 6), (11, 13), 8 * 4 * 9 * 5 * 6),
        (nn.Linear(7, 3), (2, 7), (), 21),
        (nn.Linear(7, 3), (2, 5, 7), (), 5 * 21),
    ],
    ids=str,
)
def test_one_layer(
    module: nn.Module, shape: tuple[int, ...], output_hw: tuple[int, ...], multiply_adds: int
) -> None:
    layer = only(module, *shape)
    assert layer.output_hw == output_hw
    # It is the first layer: nobody needs the gradient of the image.
    assert three(layer) == (2 * multiply_adds, 0, 2 * multiply_adds)
    assert layer.training_flops_dense == 4 * multiply_adds
    assert layer.kind == ("linear" if isinstance(module, nn.Linear) else "conv")
    assert layer.weight_shape == tuple(module.weight.shape)  # type: ignore[union-attr, arg-type]
    norm = nn.BatchNorm1d(shape[1]) if len(shape) < 4 else nn.BatchNorm2d(shape[1])
    (second,) = count(nn.Sequential(norm, module), torch.zeros(shape)).layers
    assert three(second) == (2 * multiply_adds,) * 3


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(4, 8, 3), (2, 4, 9)),
        (nn.Conv3d(2, 4, 3), (2, 2, 4, 4, 4)),
        (nn.ConvTranspose2d(4, 8, 3, stride=2), (2, 4, 5, 6)),
        (nn.Linear(7, 3), (2, 5, 7)),
    ],
    ids=str,
)
def test_a_packed_layer_counts_as_the_dense_one_with_zeros(module: nn.Module, shape: tuple[int, ...]) -> None:
    with torch.no_grad():
        module.weight.mul_(torch.rand_like(module.weight) < 0.3)  # type: ignore[union-attr, arg-type]
    model, x = nn.Sequential(module), torch.zeros(shape)
    packed = pack(model)
    assert isinstance(packed[0], PackedLayer)
    assert count(packed, x) == count(model, x)
    assert compression_ratio(packed) == compression_ratio(model) > 1


def test_a_network() -> None:
    cost = count(Residual(), torch.zeros(2, 3, 8, 8))
    assert [layer.name for layer in cost.layers] == ["stem", "conv1", "conv2", "shortcut", "fc"]
    stem, conv1, conv2, shortcut, fc = (
        2 * n for n in (4 * 27 * 64, 8 * 4 * 9 * 16, 8 * 8 * 9 * 16, 8 * 4 * 16, 8 * 5)
    )
    assert cost.forward_flops_dense == stem + conv1 + conv2 + shortcut + fc
    assert cost.training_flops_dense == 2 * stem + 3 * (conv1 + conv2 + shortcut + fc)
    assert cost.training_flops == cost.training_flops_dense
    assert cost.parameters == cost.nonzero_parameters == sum(p.numel() for p in Residual().parameters())
    assert cost.inference_flops_ratio == cost.compression_ratio == 1.0
    # Four bytes, once read and once written; two of the activations and the sum are of 8 x 4 x 4.
    assert cost.batch_norm_bytes == 4 * 2 * 4 * 64
    assert cost.activation_bytes == 4 * 2 * (4 * 64 + 8 * 16 + 8 * 16)
    assert cost.pooling_bytes == 4 * (8 * 16 + 8)
    assert cost.layer("conv1").output_hw == (4, 4)
    with pytest.raises(KeyError):
        cost.layer("conv9")


def test_modules_move_as_many_bytes_as_functions() -> None:
    functions = [F.relu, torch.tanh, F.hardswish, lambda x: F.silu(x, inplace=True), F.relu6]
    modules = [nn.ReLU(), nn.Tanh(), nn.Hardswish(), nn.SiLU(inplace=True), nn.ReLU6(inplace=True)]
    x = torch.zeros(1, 2, 4, 4)

    class Functions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for function in functions:
                x = function(x)
            return F.adaptive_avg_pool2d(F.avg_pool2d(F.max_pool2d(x, 2, 1), 2, 1), 1)

    layers = nn.Sequential(*modules, nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(1))
    one, two = count(Functions(), x), count(layers, x)
    assert one.activation_bytes == two.activation_bytes == 5 * 2 * 4 * 32
    assert one.pooling_bytes == two.pooling_bytes == 4 * 2 * (16 + 9 + 9 + 4 + 4 + 1)
    assert one.batch_norm_bytes == 0


def test_a_layer_used_twice() -> None:
    cost = count(Reused(), torch.zeros(1, 3, 8, 8))
    (layer,) = cost.layers
    per_position = 2 * 3 * 27
    assert three(layer) == (per_position * 80, per_position * 16, per_position * 80)
    assert layer.weights == cost.conv_weights == 81
    assert cost.parameters == 84


def test_who_needs_a_gradient_is_seen_in_the_data_flow() -> None:
    cost = count(TwoInputs(), torch.zeros(1, 3, 5, 5))
    a, b, frozen, end = (cost.layer(name) for name in ("a", "b", "frozen", "end"))
    conv, point = 2 * 2 * 27 * 9, 2 * 4 * 9
    assert three(a) == (2 * conv, 0, conv)
    assert three(b) == (conv, 0, 0)
    assert three(frozen) == (3 * point, point, 0)
    assert three(end) == (point, 0, point)


# ---------------------------------------------------------------- sparse


def halves(model: nn.Module, names: tuple[str, ...] = ("conv1", "conv2")) -> dict[str, Tensor]:
    masks = {}
    for name in names:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        mask = torch.zeros_like(weight, dtype=torch.bool)
        mask[:, ::2] = True
        masks[name] = mask
    return masks


def test_masks_exact_zeros_and_packed_layers_count_the_same() -> None:
    model, x = Residual(), torch.zeros(2, 3, 8, 8)
    masks = halves(model)
    masked = count(model, x, masks)
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_submodule(name).weight.masked_fill_(~mask, 0)
    zeros, packed, packed_and_masks = count(model, x), count(pack(model), x), count(pack(model), x, masks)
    assert masked == zeros == packed == packed_and_masks
    stem, conv1, conv2 = 2 * 4 * 27 * 64, 8 * 4 * 9 * 16, 8 * 8 * 9 * 16  # halved: one per multiply-add
    others = 2 * 8 * 4 * 16 + 2 * 8 * 5
    assert masked.forward_flops == stem + conv1 + conv2 + others
    assert masked.training_flops == 2 * stem + 3 * (conv1 + conv2 + others)
    assert masked.forward_flops_dense == stem + 2 * conv1 + 2 * conv2 + others
    assert masked.inference_flops_ratio == masked.forward_flops / masked.forward_flops_dense
    assert masked.layer("conv1").density == 0.5
    assert masked.nonzero_parameters == masked.parameters - (8 * 4 * 9 + 8 * 8 * 9) // 2
    weights = 4 * 27 + 8 * 36 + 8 * 72 + 8 * 4
    assert masked.compression_ratio == weights / (weights - (8 * 36 + 8 * 72) / 2)
    assert compression_ratio(model) == compression_ratio(pack(model)) == masked.compression_ratio


def test_a_run_costs_dense_until_positions_are_fixed() -> None:
    model = Residual()
    cost = count(model, torch.zeros(1, 3, 8, 8), halves(model))
    steps = [cost.training_flops_per_image(frozen) for frozen in (False, False, True)]
    assert steps == [cost.training_flops_dense] * 2 + [cost.training_flops]
    assert cost.training_flops < cost.training_flops_dense


def test_layers_without_a_mask_are_dense_once_there_are_masks() -> None:
    model = Residual()
    with torch.no_grad():
        model.fc.weight.zero_()
    x = torch.zeros(1, 3, 8, 8)
    assert count(model, x).layer("fc").nonzero == 0
    assert count(model, x, {}).layer("fc").nonzero == 40
    assert count(model, x, halves(model)).layer("fc").nonzero == 40


def test_compression_ratio_is_of_convolutions_only_and_of_shared_weights_once() -> None:
    conv = nn.Conv2d(2, 2, 1, bias=False)
    tied = nn.Conv2d(2, 2, 1, bias=False)
    tied.weight = conv.weight
    unused = nn.Conv2d(2, 2, 1)
    model = nn.ModuleDict({"a": conv, "b": tied, "unused": unused, "fc": nn.Linear(2, 2)})
    with torch.no_grad():
        conv.weight[0] = 0
        model["fc"].weight.zero_()
    assert compression_ratio(model) == 8 / 6
    assert compression_ratio(nn.Linear(2, 2)) == 1.0
    with torch.no_grad():
        conv.weight.zero_()
        unused.weight.zero_()
    assert compression_ratio(model) == 8  # as if one were left: never inf


# ---------------------------------------------------------------- against PyTorch's counter

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (2, 3, 8, 8)),
    "reused": (Reused, (2, 3, 8, 8)),
    "two inputs": (TwoInputs, (2, 3, 5, 5)),
    "transposed": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 2, 3, stride=2), nn.Conv2d(2, 2, 3)),
        (2, 3, 8, 8),
    ),
    "linear": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2)),
        (3, 3, 2, 2),
    ),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), (2, 3, 8, 8)),
    "resnet20": (lambda: create_model("resnet20", num_classes=10, stem="cifar"), (2, 3, 16, 16)),
    "vgg11": (lambda: create_model("vgg11", num_classes=10, stem="cifar", width=0.125), (2, 3, 32, 32)),
}


def counted(model: nn.Module, x: Tensor, backward: bool) -> int:
    """FLOPs per image as PyTorch sees them."""
    with FlopCounterMode(display=False) as counter:
        y = model(x)
        if backward:
            y.sum().backward()
    return counter.get_total_flops() // len(x)


@pytest.mark.parametrize("name", NETWORKS)
def test_dense_networks_against_the_flop_counter(name: str) -> None:
    make, shape = NETWORKS[name]
    model, x = make(), torch.randn(shape)
    cost = count(model, x)
    assert cost.forward_flops_dense == counted(model, x, backward=False)
    assert cost.training_flops_dense == counted(model, x, backward=True)


def test_grouped_networks_against_the_flop_counter() -> None:
    """Forward only: PyTorch's formula for grad-weight leaves the groups out."""
    for model in (Residual(groups=4), create_model("mobilenet_v1", num_classes=10, stem="cifar", width=0.25)):
        x = torch.randn(1, 3, 32, 32)
        assert count(model, x).forward_flops_dense == counted(model, x, backward=False)


# ---------------------------------------------------------------- no trace


class Awkward(nn.Module):
    """Keeps statistics and draws random numbers whatever its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = F.batch_norm(self.conv(x), self.mean, torch.ones(3), training=True)
        return F.dropout(y * random.random(), training=True)


def test_nothing_is_changed() -> None:
    model = nn.Sequential(Awkward(), Residual(), nn.BatchNorm1d(5))
    model[1].bn.eval()
    model[1].stem.weight.grad = torch.ones_like(model[1].stem.weight)
    before = copy.deepcopy(model)
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    rng = torch.get_rng_state()
    count(model, x)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    assert not all(modes)
    for (key, now), then in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(now, then), key
    assert all(p.grad is None for p in model.parameters() if p is not model[1].stem.weight)
    assert torch.equal(model[1].stem.weight.grad, torch.ones_like(model[1].stem.weight))
    assert x.grad is None
    assert not any(m._forward_hooks for m in model.modules())


def test_nothing_is_left_after_an_error() -> None:
    model = Residual()
    with pytest.raises(RuntimeError):
        count(model, torch.zeros(1, 7, 8, 8))
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_under_no_grad_and_compiled() -> None:
    model, x = Residual(), torch.zeros(1, 3, 8, 8)
    expected = count(model, x)
    with torch.no_grad():
        assert count(model, x) == expected
    with torch.inference_mode():
        assert count(model, torch.zeros(1, 3, 8, 8)) == expected
    assert count(torch.compile(model, backend="eager"), x) == expected
    model.compile(backend="eager")
    model(x)
    assert count(model, x) == expected


def test_per_image_whatever_the_batch() -> None:
    costs = {n: count(Residual(), torch.zeros(n, 3, 8, 8)) for n in (1, 3)}
    assert costs[1] == costs[3]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"conv9": torch.ones(1, dtype=torch.bool)}, "masks for conv9"),
        ({"bn": torch.ones(4, dtype=torch.bool)}, "masks for bn"),
        ({"conv1": torch.ones(4, dtype=torch.bool)}, r"mask of conv1 is of shape \(4,\)"),
    ],
)
def test_masks_that_fit_nothing(masks: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        count(Residual(), torch.zeros(1, 3, 8, 8), masks)


def test_no_images() -> None:
    with pytest.raises(UserError, match="at least one image"):
        count(Residual(), torch.zeros(0, 3, 8, 8))


def test_empty_model_cost() -> None:
    cost = count(nn.ReLU(), torch.zeros(1, 3))
    assert cost == ModelCost((), 0, 0, 0, 0, activation_bytes=24)
    assert (cost.inference_flops_ratio, cost.compression_ratio) == (0.0, 1.0)


def test_packed_with_an_optimizer_in_place() -> None:
    model = Residual()
    masks = halves(model)
    expected = count(model, torch.zeros(1, 3, 8, 8), masks)
    pack_model_(model, masks)
    assert count(model, torch.zeros(1, 3, 8, 8)) == expected
