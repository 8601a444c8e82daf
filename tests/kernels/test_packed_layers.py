"""Every layer type with a packed form: as the masked dense layer, in training, in files, there and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clicktrain
from clicktrain.formats.packed import Structure
from clicktrain.formats.packed_file import load_packed, save_packed
from clicktrain.kernels.native import missing_toolchain, toolchain
from clicktrain.kernels.pack_model import dense_state_dict, pack_model_, unpack_model_
from clicktrain.kernels.sparse_conv2d.packed_layer import PACKED_FORMS, PackedLayer, refusal

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8), (5, 12)),
    "linear on sequences": (lambda: nn.Linear(12, 8, bias=False), (2, 3, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 5, stride=2, padding=2), (3, 4, 11)),
    "conv1d, dilated, grouped": (lambda: nn.Conv1d(4, 6, 3, dilation=2, groups=2, padding="same"), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 6)),
    "conv2d, depthwise": (lambda: nn.Conv2d(6, 6, 7, padding=3, groups=6), (2, 6, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (3, 3, 2), padding=1, stride=(1, 2, 1)), (2, 2, 4, 5, 6)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2),
        (2, 4, 4, 5),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 4, 2, dilation=2), (2, 2, 3, 3, 3)),
}


def test_every_form_is_tested() -> None:
    assert {type(make()) for make, _ in LAYERS.values()} == set(PACKED_FORMS)


def masked(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer in double precision, an input, and a mask that keeps half of the weights."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().double()
    mask = torch.rand(layer.weight.shape) < 0.5
    with torch.no_grad():
        layer.weight.masked_fill_(~mask, 0.0)
    return layer, torch.randn(shape, dtype=torch.float64, requires_grad=True), mask


@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_layer_computes_and_trains_as_the_masked_dense_one(name: str, tmp_path: Path) -> None:
    layer, x, mask = masked(name)
    dense, packed = nn.Sequential(layer), nn.Sequential(copy.deepcopy(layer))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (dense, packed)]
    pack_model_(packed, {"0": mask}, optimizers[1:])
    assert isinstance(packed[0], PackedLayer)
    for _ in range(3):
        inputs = [x.detach().clone().requires_grad_() for _ in range(2)]
        outputs = [model(one) for model, one in zip((dense, packed), inputs, strict=True)]
        assert torch.allclose(outputs[0], outputs[1])
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            output.square().sum().backward()
        layer.weight.grad.masked_fill_(~mask, 0.0)
        assert torch.allclose(inputs[0].grad, inputs[1].grad)
        for optimizer in optimizers:
            optimizer.step()
    state = dense_state_dict(packed)
    for key, value in dense.state_dict().items():
        assert torch.allclose(state[key], value), key
    save_packed(tmp_path / "packed", dense.state_dict(), {"0": mask})
    again = nn.Sequential(LAYERS[name][0]().double())
    again.load_state_dict(load_packed(tmp_path / "packed"))
    assert torch.equal(again[0].weight, layer.weight)
    packed.load_state_dict(dense.state_dict())  # dense weights, packed at this layer's positions
    unpack_model_(packed, optimizers[1:])
    assert type(packed[0]) is type(layer)
    assert torch.equal(packed[0].weight, layer.weight)
    assert torch.allclose(packed(x), dense(x))


@pytest.mark.parametrize("name", LAYERS)
def test_copies_states_and_the_public_functions(name: str) -> None:
    layer, x, _ = masked(name)
    packed = clicktrain.pack(nn.Sequential(layer))
    assert isinstance(packed[0], PackedLayer)
    assert packed[0].impl == "reference"
    twin = copy.deepcopy(packed)
    twin.load_state_dict(packed.state_dict())
    assert torch.equal(twin(x), packed(x))
    assert torch.equal(packed[0].weight, layer.weight)
    assert "density=" in repr(packed)
    plain = clicktrain.unpack(packed)
    assert torch.equal(plain(x), nn.Sequential(layer)(x))
    assert torch.equal(packed.float()(x.float()).detach().double(), twin.float()(x.float()).detach().double())


@pytest.mark.skipif(toolchain() is None, reason=missing_toolchain() or "")
@pytest.mark.parametrize("name", ["linear", "linear on sequences", "conv1d", "conv1d, dilated, grouped"])
def test_generated_kernels_compute_what_the_reference_does(name: str) -> None:
    layer, x, mask = masked(name)
    packed = PACKED_FORMS[type(layer)].from_dense(layer, mask)
    results = []
    for impl in ("reference", "blocked"):
        packed.use(impl)
        inputs = x.detach().clone().requires_grad_()
        y = packed(inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), [inputs, *packed.parameters()])])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other)


def test_a_layer_without_generated_kernels_says_so() -> None:
    layer, _, mask = masked("conv3d")
    packed = PACKED_FORMS[type(layer)].from_dense(layer, mask)
    with pytest.raises(ValueError, match="PackedConv3d has no implementation 'blocked'"):
        packed.use("blocked")
    with pytest.raises(ValueError, match="no 2-D convolution"):
        packed.structure.as_conv2d()


def test_a_transposed_convolution_takes_an_output_size() -> None:
    layer = nn.ConvTranspose2d(2, 3, 3, stride=2)
    packed = PACKED_FORMS[nn.ConvTranspose2d].from_dense(copy.deepcopy(layer), layer.weight.new_ones(
        layer.weight.shape, dtype=torch.bool))  # fmt: skip
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(packed(x, output_size=[10, 9]), layer(x, output_size=[10, 9]))


def test_the_linear_layer_of_an_attention_is_left_alone() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert "attention" in (refusal(attention.out_proj) or "")


def test_one_index_serves_both_views() -> None:
    structure = Structure.from_mask(torch.rand(4, 6) < 0.5)
    twin = structure.as_conv2d()
    assert twin.shape == (4, 6, 1, 1)
    assert twin is structure.as_conv2d()
    assert twin.col_indices is structure.col_indices


@pytest.mark.skipif(toolchain() is None, reason=missing_toolchain() or "")
def test_accelerate_chooses_implementations_for_layers_that_are_no_2d_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose1d(8, 4, 3), nn.Flatten(), nn.Linear(40, 6)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) < 0.3)
    x = torch.randn(8, 2, 8)
    packed = clicktrain.pack(model)
    fast = clicktrain.accelerate(packed, x, rule="sparse")
    chosen = {name: module.impl for name, module in packed.named_modules() if isinstance(module, PackedLayer)}
    assert chosen == {"0": "blocked", "2": "reference", "4": "blocked"}
    expected, got = model(x), fast(x)
    assert torch.allclose(got, expected, atol=1e-5)
    expected.square().sum().backward()
    got.square().sum().backward()
    for name, module in packed.named_modules():
        if isinstance(module, PackedLayer):
            gradient = model.get_submodule(name).weight.grad
            assert torch.allclose(module.weight.grad, gradient * module.structure.mask(), atol=1e-4), name
