"""Packed weights: what lies where, equal and unequal numbers per filter, gradients."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clicktrain.formats.packed import (
    PackedWeight,
    Structure,
    bits_from_mask,
    mask_from_bits,
    pack_values,
    unpack_values,
)


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    shape = tuple(draw(st.integers(1, 5)) for _ in range(4))
    flat = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))).flatten(1)
    if draw(st.booleans()):
        kept = draw(st.integers(0, flat.shape[1]))
        return (flat.argsort(dim=1).argsort(dim=1) < kept).view(shape)
    return (flat < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))).view(shape)


@given(mask=masks())
@settings(max_examples=60)
def test_structure_and_values_against_loops(mask: Tensor) -> None:
    structure = Structure.from_mask(mask)
    dense = torch.randn(mask.shape)
    values = pack_values(structure, dense)
    rows = [row[keep].tolist() for row, keep in zip(dense.flatten(1), mask.flatten(1), strict=True)]
    columns = [keep.nonzero()[:, 0].tolist() for keep in mask.flatten(1)]
    equal = len({len(row) for row in rows}) == 1
    assert structure.shape == tuple(mask.shape)
    assert structure.nnz == int(mask.sum())
    assert structure.density == pytest.approx(float(mask.float().mean()))
    assert structure.nnz_per_filter == (len(rows[0]) if equal else None)
    assert values.shape == structure.values_shape == structure.col_indices.shape
    if equal:
        assert structure.crow_indices is None
        assert values.tolist() == rows
        assert structure.col_indices.tolist() == columns
    else:
        assert structure.crow_indices is not None
        edges = structure.crow_indices.tolist()
        assert [values[a:b].tolist() for a, b in itertools.pairwise(edges)] == rows
        assert [structure.col_indices[a:b].tolist() for a, b in itertools.pairwise(edges)] == columns
    assert torch.equal(structure.mask(), mask)
    assert torch.equal(unpack_values(structure, values), dense * mask)
    assert Structure.from_bits(structure.bits(), structure.shape).same_as(structure)


@given(mask=masks())
@settings(max_examples=25)
def test_gradients_are_gather_and_scatter(mask: Tensor) -> None:
    structure = Structure.from_mask(mask)
    values = torch.randn(structure.values_shape, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(mask.shape, dtype=torch.float64)
    unpack_values(structure, values).backward(grad)
    assert torch.equal(values.grad, pack_values(structure, grad))
    dense = torch.randn(mask.shape, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(structure.values_shape, dtype=torch.float64)
    pack_values(structure, dense).backward(grad)
    assert torch.equal(dense.grad, unpack_values(structure, grad))


def test_equal_filters_get_a_rectangle_and_unequal_ones_csr() -> None:
    """By hand: 2 filters, 1 channel, 2 x 2 kernels."""
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0]], dtype=torch.bool).view(2, 1, 2, 2)
    weight = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]).view(2, 1, 2, 2)
    structure = Structure.from_mask(mask)
    assert structure.col_indices.tolist() == [[0, 3], [1, 2]]
    assert pack_values(structure, weight).tolist() == [[1, 4], [6, 7]]
    ragged = Structure.from_mask(mask.clone().index_fill_(0, torch.tensor(0), False))
    assert ragged.crow_indices.tolist() == [0, 0, 2]
    assert ragged.col_indices.tolist() == [1, 2]
    assert PackedWeight(ragged, torch.tensor([6.0, 7.0])).to_dense().flatten().tolist() == [0] * 5 + [6, 7, 0]


def test_bits_by_hand() -> None:
    mask = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    mask[0, 0, 0, 0] = mask[0, 0, 1, 0] = mask[0, 0, 2, 2] = True
    assert bits_from_mask(mask).tolist() == [0b1001, 0b1]
    assert torch.equal(mask_from_bits(torch.tensor([9, 1], dtype=torch.uint8), (1, 1, 3, 3)), mask)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (torch.tensor([9, 2], dtype=torch.uint8), "after the last weight"),
        (torch.tensor([9], dtype=torch.uint8), "is uint8"),
        (torch.tensor([9, 1, 0], dtype=torch.uint8), "is uint8"),
        (torch.tensor([9, 1]), "is uint8"),
    ],
)
def test_wrong_bits(bits: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_from_bits(bits, (1, 1, 3, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.bool])
def test_any_dtype_and_memory_format(dtype: torch.dtype) -> None:
    mask = torch.rand(4, 3, 3, 3) < 0.3
    structure = Structure.from_mask(mask)
    dense = torch.randn(4, 3, 3, 3).to(dtype).to(memory_format=torch.channels_last)
    unpacked = unpack_values(structure, pack_values(structure, dense))
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, dense & mask if dtype is torch.bool else dense * mask)


def test_wrong_shapes() -> None:
    structure = Structure.from_mask(torch.ones(2, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="structure is of a weight"):
        pack_values(structure, torch.ones(2, 9))
    with pytest.raises(ValueError, match="a mask is bool"):
        Structure.from_mask(torch.ones(2, 1, 3, 3))
    with pytest.raises(ValueError, match="a mask is bool"):
        Structure.from_mask(torch.ones(9, dtype=torch.bool))


def test_same_as_copy_and_device() -> None:
    mask = torch.rand(4, 3, 3, 3) < 0.5
    structure = Structure.from_mask(mask)
    other = mask.clone()
    other[0, 0] = ~other[0, 0]
    assert copy.deepcopy(structure).same_as(structure)
    assert not Structure.from_mask(other).same_as(structure)
    assert structure.to("cpu") is structure
    moved = Structure.from_mask(torch.ones_like(mask)).to("meta")
    assert moved.device.type == "meta"
    assert moved.values_shape == (4, 27)
