"""Every implementation against dense convolution with a masked weight, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clicktrain.formats.packed import Structure, pack_values, unpack_values
from clicktrain.kernels.sparse_conv2d import IMPLS, sparse_conv2d

ON_CPU = [name for name, impl in IMPLS.items() if not impl.devices or "cpu" in impl.devices]
"""`test_triton_kernels.py` runs the others in Triton's interpreter."""


def make(
    shape: tuple[int, int, int, int], x_shape: tuple[int, ...], density: float, equal: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Input, weight, mask and bias, float64; some filters and kernels may be empty."""
    flat = torch.rand(shape).flatten(1)
    kept = round(flat.shape[1] * density)
    mask = (flat.argsort(1).argsort(1) < kept if equal else flat < density).view(shape)
    x = torch.randn(x_shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    b = torch.randn(shape[0], dtype=torch.float64, requires_grad=True) if bias else None
    return x, weight, mask, b


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    padding = draw(st.sampled_from([0, 1, (2, 1), "same", "valid"]))
    odd = st.sampled_from([1, 3])
    kernel = (
        (draw(odd), draw(odd)) if padding == "same" else (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    )
    stride = 1 if padding == "same" else draw(st.sampled_from([1, 2, (1, 2)]))
    return {
        "seed": draw(st.integers(0, 999)),
        "shape": (groups * draw(st.integers(1, 4)), draw(st.integers(1, 4)), *kernel),
        "x": (draw(st.integers(1, 3)), draw(st.integers(7, 9)), draw(st.integers(7, 10))),
        "density": draw(st.sampled_from([0.0, 0.1, 0.3, 0.44, 1.0])),
        "equal": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "options": {
            "stride": stride,
            "padding": padding,
            "dilation": draw(st.sampled_from([1, 2, (2, 1)])),
            "groups": groups,
        },
    }


@pytest.mark.parametrize("impl", ON_CPU)
@given(problem=problems())
@settings(max_examples=16)
def test_forward_and_every_gradient(impl: str, problem: dict[str, Any]) -> None:
    torch.manual_seed(problem["seed"])
    options = problem["options"]
    n, h, w = problem["x"]
    shape = problem["shape"]
    x, weight, mask, bias = make(
        shape, (n, shape[1] * options["groups"], h, w), problem["density"], problem["equal"], problem["bias"]
    )
    structure = Structure.from_mask(mask)
    values = pack_values(structure, weight).detach().requires_grad_()
    y = sparse_conv2d(x, values, structure, bias, **options, impl=impl)
    expected = F.conv2d(x, weight * mask, bias, **options)
    tolerance = IMPLS[impl].tolerance[torch.float64]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(expected)
    inputs = [x] if bias is None else [x, bias]
    dx, *db, dv = torch.autograd.grad(y, [*inputs, values], grad)
    ex, *eb, ew = torch.autograd.grad(expected, [*inputs, weight], grad)
    tolerance *= 10  # sums over the batch
    torch.testing.assert_close(dx, ex, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(db, eb, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(unpack_values(structure, dv), ew, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2, "groups": 2}],
    ids=["plain", "strided", "same-dilated-grouped"],
)
def test_gradcheck(impl: str, equal: bool, options: dict[str, Any]) -> None:
    groups = options.get("groups", 1)
    x, weight, mask, bias = make((4, 2, 3, 3), (2, 2 * groups, 4, 5), 0.4, equal, True)
    structure = Structure.from_mask(mask)
    values = pack_values(structure, weight).detach().requires_grad_()

    def run(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return sparse_conv2d(x, values, structure, bias, **options, impl=impl)

    assert torch.autograd.gradcheck(run, (x, values, bias))


@pytest.mark.parametrize("impl", ON_CPU)
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_image_without_batch_and_formats(impl: str, channels_last: bool) -> None:
    x, weight, mask, _ = make((3, 2, 3, 3), (1, 2, 6, 6), 0.4, True, False)
    structure = Structure.from_mask(mask)
    values = pack_values(structure, weight)
    expected = F.conv2d(x, weight * mask)
    if channels_last:
        y = sparse_conv2d(x.contiguous(memory_format=torch.channels_last), values, structure, impl=impl)
        torch.testing.assert_close(y, expected)
    else:
        torch.testing.assert_close(sparse_conv2d(x[0], values, structure, impl=impl), expected[0])


def test_arguments_that_do_not_fit() -> None:
    structure = Structure.from_mask(torch.ones(4, 2, 3, 3, dtype=torch.bool))
    x, values = torch.ones(1, 2, 8, 8), torch.ones(4, 18)
    with pytest.raises(ValueError, match=r"no implementation 'fast'.*reference"):
        sparse_conv2d(x, values, structure, impl="fast")
    with pytest.raises(ValueError, match=r"x has to be \[N, 2, H, W\]"):
        sparse_conv2d(torch.ones(1, 3, 8, 8), values, structure)
    with pytest.raises(ValueError, match=r"x has to be"):
        sparse_conv2d(torch.ones(2, 8), values, structure)
    with pytest.raises(ValueError, match="values have to be"):
        sparse_conv2d(x, values[:, 1:], structure)
    with pytest.raises(ValueError, match="bias has to be"):
        sparse_conv2d(x, values, structure, torch.ones(3))
    with pytest.raises(ValueError, match="3 groups"):
        sparse_conv2d(torch.ones(1, 6, 8, 8), values, structure, groups=3)
    with pytest.raises(ValueError, match="padding is"):
        sparse_conv2d(x, values, structure, padding="full")
