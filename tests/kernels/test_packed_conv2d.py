"""The packed layer as a module: what it takes over, what it saves, what copies and traces it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from clicktrain.errors import UserError
from clicktrain.kernels.sparse_conv2d import PackedConv2d

OPTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1, "bias": False},
    {"kernel_size": (3, 1), "stride": (1, 2), "padding": (1, 0), "dilation": (2, 1)},
    {"kernel_size": 3, "padding": "same", "groups": 2},
    {"kernel_size": 1},
]


def packed_pair(equal: bool = True, **options: Any) -> tuple[nn.Conv2d, PackedConv2d]:
    """A masked convolution and a packed copy."""
    conv = nn.Conv2d(4, 6, **(options or OPTIONS[0]), dtype=torch.float64)
    flat = torch.rand_like(conv.weight).flatten(1)
    mask = (flat.argsort(1).argsort(1) < flat.shape[1] // 2 if equal else flat < 0.4).view_as(conv.weight)
    with torch.no_grad():
        conv.weight *= mask
    return conv, PackedConv2d.from_dense(copy.deepcopy(conv), mask)


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_output_there_and_back(options: dict[str, Any], equal: bool) -> None:
    conv, packed = packed_pair(equal, **options)
    x = torch.randn(2, 4, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(packed(x), conv(x))
    back = packed.to_dense()
    assert torch.equal(back.weight, conv.weight)
    assert repr(back) == repr(conv)
    assert back.state_dict().keys() == conv.state_dict().keys()
    assert back.bias is packed.bias
    assert type(back.weight) is nn.Parameter
    assert back.weight.device == conv.weight.device


def test_what_is_taken_over() -> None:
    conv = nn.Conv2d(2, 3, 3).eval()
    conv.weight.requires_grad_(False)
    conv.weight.tag = "mine"  # type: ignore[attr-defined]
    bias, calls = conv.bias, []
    after = conv.register_forward_hook(lambda *_: calls.append("after"))
    conv.register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True)
    mask = torch.rand(3, 2, 3, 3) < 0.5
    packed = PackedConv2d.from_dense(conv, mask)
    assert not packed.training
    assert not packed.values.requires_grad
    assert packed.values.tag == "mine"
    assert packed.bias is bias
    packed(torch.ones(1, 2, 4, 4))
    assert calls == ["before", "after"]
    after.remove()
    back = packed.to_dense()
    back(torch.ones(1, 2, 4, 4))
    assert calls == ["before", "after", "before"]
    assert not back.weight.requires_grad
    assert not back.training


def test_the_gradient_goes_along() -> None:
    conv = nn.Conv2d(2, 3, 3)
    conv(torch.randn(1, 2, 5, 5)).sum().backward()
    grad = conv.weight.grad.clone()
    mask = torch.rand(3, 2, 3, 3) < 0.5
    packed = PackedConv2d.from_dense(conv, mask)
    assert torch.equal(packed.to_dense().weight.grad, grad * mask)


def test_state_dict_round_trip_brings_its_own_positions() -> None:
    _, one = packed_pair()
    _, two = packed_pair()
    assert list(one.state_dict()) == ["values", "keep_bits"]
    assert not one.structure.same_as(two.structure)
    two.load_state_dict(one.state_dict())
    assert two.structure.same_as(one.structure)
    assert torch.equal(two.dense_weight(), one.dense_weight())
    assert torch.equal(two.structure.bits(), two.keep_bits)


def test_a_state_dict_that_does_not_fit() -> None:
    _, one = packed_pair()
    before = one.dense_weight().detach().clone()
    state = one.state_dict()
    wrong = {**state, "keep_bits": torch.full_like(state["keep_bits"], 255)}
    with pytest.raises(RuntimeError, match="keep_bits"):
        one.load_state_dict(wrong)
    _, fewer = packed_pair(kernel_size=3, padding=1, bias=False)
    mask = fewer.structure.mask()
    mask[:, 0] = False
    other = PackedConv2d.from_dense(fewer.to_dense(), mask)
    with pytest.raises(RuntimeError, match="keep_bits keep values of shape"):
        one.load_state_dict(other.state_dict())
    assert torch.equal(one.dense_weight(), before)


@pytest.mark.parametrize("equal", [True, False])
def test_copies_and_moves(equal: bool) -> None:
    _, packed = packed_pair(equal)
    twin = copy.deepcopy(packed)
    with torch.no_grad():
        twin.values.zero_()
    assert bool(packed.values.any())
    half = twin.to(torch.bfloat16)
    assert half.values.dtype == torch.bfloat16
    assert half.keep_bits.dtype == torch.uint8
    assert half(torch.ones(1, 4, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    moved = copy.deepcopy(packed).to("meta")
    assert moved.structure.device.type == "meta"
    assert moved(torch.ones(1, 4, 5, 5, dtype=torch.float64, device="meta")).shape == (1, 6, 5, 5)


@pytest.mark.parametrize("equal", [True, False])
def test_fx_and_compile(equal: bool) -> None:
    conv, packed = packed_pair(equal)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    model = nn.Sequential(packed, nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), conv(x).relu())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, conv(x).relu())
    y.sum().backward()
    assert packed.values.grad is not None


def test_autocast() -> None:
    conv, packed = packed_pair()
    conv, packed = conv.float(), packed.float()
    x = torch.randn(1, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = packed(x), conv(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.sum().backward()
    assert packed.values.grad.dtype == torch.float32


def test_implementation_is_chosen_by_name() -> None:
    _, packed = packed_pair()
    assert "density=0.5, impl=reference" in repr(packed)
    with pytest.raises(ValueError, match="no implementation 'fast'"):
        packed.use("fast")
    assert packed.impl == "reference"
    with pytest.raises(ValueError, match="values have to be"):
        PackedConv2d(packed.structure, packed.values[1:])


class OwnForward(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class OwnInit(nn.Conv2d):
    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)


def hooked() -> nn.Module:
    conv = nn.Conv2d(2, 3, 3)
    conv.weight.register_hook(lambda grad: grad)
    return conv


def with_buffer() -> nn.Module:
    conv = nn.Conv2d(2, 3, 3)
    conv.register_buffer("scale", torch.ones(1))
    return conv


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (lambda: OwnForward(2, 3, 3), "OwnForward has a forward of its own"),
        (lambda: nn.ConvTranspose2d(3, 2, 3), "it is a ConvTranspose2d"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), "parametrization"),
        (lambda: prune.random_unstructured(nn.Conv2d(2, 3, 3), "weight", 0.5), "parametrization"),
        (lambda: nn.Conv2d(2, 3, 3, dtype=torch.complex64), "complex64"),
        (hooked, "hooks on its weight"),
        (with_buffer, "more than a weight and a bias"),
    ],
)
def test_layers_that_are_refused(make: Any, reason: str) -> None:
    with pytest.raises(UserError, match=f"features.0 cannot be packed: .*{reason}"):
        PackedConv2d.from_dense(make(), torch.ones(3, 2, 3, 3, dtype=torch.bool), "features.0")


def test_a_lazy_layer_is_refused() -> None:
    with warnings.catch_warnings():  # some versions of torch warn about lazy modules
        warnings.simplefilter("ignore")
        lazy = nn.LazyConv2d(3, 3)
    with pytest.raises(UserError, match="lazy"):
        PackedConv2d.from_dense(lazy, torch.ones(3, 2, 3, 3, dtype=torch.bool))


def test_a_subclass_that_only_starts_differently_is_packed() -> None:
    packed = PackedConv2d.from_dense(OwnInit(2, 3, 3), torch.ones(3, 2, 3, 3, dtype=torch.bool))
    assert bool((packed.values == 1).all())


def test_a_mask_that_does_not_fit() -> None:
    for mask in (torch.ones(3, 2, 3, 3), torch.ones(3, 2, 3, dtype=torch.bool)):
        with pytest.raises(UserError, match=r"the layer cannot be packed: its mask is"):
            PackedConv2d.from_dense(nn.Conv2d(2, 3, 3), mask)
