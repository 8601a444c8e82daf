"""Packed weights: an index, and the values that train.

ClickTrain section 5.1: once patterns are final the nonzero positions stay, so the index is built once, and
refreshing the values from a dense weight is a gather (the paper's ``Convert2CSR`` with given ``rowPtr`` and
``colInd``). While masks still move, each move makes another index, and values go from one to the other. The
names are those of PyTorch's CSR tensors; a row is what the first axis of the weight counts (a filter of a
convolution, an output of a linear layer), its columns are the flat positions of its weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "PackedWeight",
    "Patterns",
    "Structure",
    "bits_from_mask",
    "mask_from_bits",
    "pack_values",
    "places_in",
    "unpack_values",
]

Patterns: TypeAlias = tuple[tuple[int, ...], ...]
"""Sets of positions that a kernel may keep, each ascending, in 0 to R*S - 1; none of them: any set."""
_BIT_VALUES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, eq=False)
class Structure:
    """The positions of the nonzero weights of a layer.

    Attributes:
        shape: of the dense weight, two dimensions or more: (F, C, R, S) of a 2-D convolution, with
            C = in_channels / groups.
        col_indices: int32, kept positions in C*R*S of each filter, ascending. [F, nnz_per_filter] if all
            filters keep equally many (ClickTrain section 5.2), else [nnz], filter after filter.
        crow_indices: None if all filters keep equally many, else int64 [F + 1]: filter f has
            ``col_indices[crow_indices[f]:crow_indices[f + 1]]``. Never None where positions still move.
        patterns: None where positions are final. Where they move, the patterns that kernels may ever have:
            what code is generated for depends on these, and not on the positions of the moment.

    Make one with `from_mask` or `from_bits`; they choose the form.
    """

    shape: tuple[int, ...]
    col_indices: Tensor
    crow_indices: Tensor | None = None
    patterns: Patterns | None = None
    _flat: Tensor | None = field(default=None, init=False, repr=False)
    _conv2d: Structure | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.crow_indices is not None:
            f = self.shape[0]
            rows = torch.repeat_interleave(
                torch.arange(f, device=self.device), self.crow_indices.diff(), output_size=self.nnz
            )
            flat = self.col_indices + rows * self.row_length
            object.__setattr__(self, "_flat", flat.to(torch.int32))

    @classmethod
    def from_mask(cls, mask: Tensor, patterns: Patterns | None = None) -> Structure:
        """Build the index of a mask, bool, of the weight's shape, True = kept; on the mask's device.

        With ``patterns`` positions still move: values are [nnz] then whatever the filters keep, so that their
        shape depends on their number alone.
        """
        if mask.dim() < 2 or mask.dtype != torch.bool:
            raise ValueError(
                f"a mask is bool with two or more dimensions, got {mask.dtype} {list(mask.shape)}"
            )
        shape = tuple(mask.shape)
        rows = mask.reshape(shape[0], math.prod(shape[1:]))
        counts = rows.sum(1)
        columns = rows.nonzero()[:, 1].to(torch.int32)
        if patterns is None and shape[0] > 0 and bool((counts == counts[0]).all()):
            return cls(shape, columns.view(shape[0], -1) if len(columns) else columns.new_empty(shape[0], 0))
        return cls(shape, columns, torch.nn.functional.pad(counts.cumsum(0), (1, 0)), patterns)

    @classmethod
    def from_bits(cls, bits: Tensor, shape: tuple[int, ...], patterns: Patterns | None = None) -> Structure:
        """Build the index of a bit mask as `bits` gives it; errors as `mask_from_bits`."""
        return cls.from_mask(mask_from_bits(bits, shape), patterns)

    def mask(self) -> Tensor:
        """Bool, of the weight's shape, True = kept."""
        ones = torch.ones(self.values_shape, dtype=torch.bool, device=self.device)
        return unpack_values(self, ones)

    def bits(self) -> Tensor:
        """One bit a weight, uint8 [ceil(numel / 8)]: see `bits_from_mask`."""
        return bits_from_mask(self.mask())

    @property
    def nnz(self) -> int:
        """Kept weights."""
        return self.col_indices.numel()

    @property
    def nnz_per_filter(self) -> int | None:
        """Kept weights of every filter, None if they are not equally many."""
        return self.col_indices.shape[1] if self.crow_indices is None else None

    @property
    def numel(self) -> int:
        """All weights."""
        return self.shape[0] * self.row_length

    @property
    def row_length(self) -> int:
        """Weights of one row: C*R*S of a filter."""
        return math.prod(self.shape[1:])

    def as_conv2d(self) -> Structure:
        """The same positions in a weight [F, C, R, S], sharing the index; the same object at each call.

        A linear layer's weight is [O, I, 1, 1], a 1-D convolution's [F, C, 1, S].

        Raises:
            ValueError: the weight has five dimensions or more.
        """
        if len(self.shape) == 4:
            return self
        if self._conv2d is None:
            if len(self.shape) > 4:
                raise ValueError(f"a weight of shape {self.shape} is that of no 2-D convolution")
            f, c, *columns = self.shape
            twin = Structure(
                (f, c, 1, *(columns or (1,))), self.col_indices, self.crow_indices, self.patterns
            )
            object.__setattr__(twin, "_flat", self._flat)
            object.__setattr__(self, "_conv2d", twin)
        return self._conv2d  # type: ignore[return-value]

    @property
    def density(self) -> float:
        """Kept weights / all weights."""
        return self.nnz / max(self.numel, 1)

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Shape of packed values: (F, nnz_per_filter), or (nnz,)."""
        return tuple(self.col_indices.shape)

    @property
    def device(self) -> torch.device:
        """Where the index lies."""
        return self.col_indices.device

    def to(self, device: torch.device | str) -> Structure:
        """The same structure on another device (itself if it is there already)."""
        if torch.device(device) == self.device:
            return self
        return self.map(lambda index: index.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> Structure:
        """A structure whose index tensors went through ``function`` (a move to a device)."""
        crow = None if self.crow_indices is None else function(self.crow_indices)
        return Structure(self.shape, function(self.col_indices), crow, self.patterns)

    def flat(self) -> Tensor:
        """Flat places of the kept weights in the dense one, ascending: int32 [nnz]."""
        if self._flat is not None:
            return self._flat
        first = torch.arange(self.shape[0], device=self.device, dtype=torch.int32) * self.row_length
        return (self.col_indices + first[:, None]).view(-1)

    def same_as(self, other: Structure) -> bool:
        """Whether the same weights of the same shape are kept."""
        return (
            self.shape == other.shape
            and self.values_shape == other.values_shape
            and bool((self.mask() == other.mask().to(self.device)).all())
        )


class PackedWeight(NamedTuple):
    """A sparse weight: a fixed structure and its values (shape `Structure.values_shape`)."""

    structure: Structure
    values: Tensor

    def to_dense(self) -> Tensor:
        """The dense weight, with zeros in place; differentiable."""
        return unpack_values(self.structure, self.values)


def pack_values(structure: Structure, dense: Tensor) -> Tensor:
    """Gather the kept weights: ClickTrain section 5.1, conversion with predefined nonzero positions.

    What ``dense`` (any dtype and memory format, on the structure's device) has outside the structure is left
    out. Differentiable. The result is [F, nnz_per_filter], or [nnz] for filters with unequal counts.
    """
    if tuple(dense.shape) != structure.shape:
        raise ValueError(f"the structure is of a weight {structure.shape}, got {tuple(dense.shape)}")
    if structure._flat is not None:
        return dense.reshape(-1).index_select(0, structure._flat)
    return dense.reshape(structure.shape[0], structure.row_length).gather(1, structure.col_indices.long())


def unpack_values(structure: Structure, values: Tensor) -> Tensor:
    """Inverse of `pack_values`: the dense weight, with zeros in place.

    Differentiable: the gradient of the values is the gather of the gradient of the result.
    """
    # In place into fresh zeros: the out-of-place scatter would copy them first. Indices are kept in four
    # bytes and have eight for the call alone.
    if structure._flat is not None:
        flat = values.new_zeros(structure.numel).scatter_(0, structure._flat.long(), values)
        return flat.view(structure.shape)
    rows = values.new_zeros(structure.shape[0], structure.row_length)
    return rows.scatter_(1, structure.col_indices.long(), values).view(structure.shape)


def places_in(old: Structure, new: Structure) -> Tensor:
    """Where each value of ``new`` is among those of ``old``, int64 [new.nnz]; old.nnz where it is not."""
    where = torch.full((old.numel,), old.nnz, dtype=torch.int32, device=old.device)
    where[old.flat().long()] = torch.arange(old.nnz, dtype=torch.int32, device=old.device)
    return where[new.flat().to(old.device).long()].long()


def bits_from_mask(mask: Tensor) -> Tensor:
    """Write a mask with one bit a weight: uint8 [ceil(numel / 8)].

    Bit i % 8 (1 << (i % 8)) of byte i // 8 is element i of the flat mask; those left over at the end are 0.
    """
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(), bitorder="little"))
    flat = torch.nn.functional.pad(mask.reshape(-1).to(torch.uint8), (0, -mask.numel() % 8))
    place = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=mask.device)
    return (flat.view(-1, 8) * place).sum(1, dtype=torch.uint8)


def mask_from_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `bits_from_mask`; ValueError unless the bits are those of a mask of that shape."""
    numel = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.dim() != 1 or bits.numel() != (numel + 7) // 8:
        raise ValueError(
            f"a mask of {tuple(shape)} is uint8 [{(numel + 7) // 8}], got {bits.dtype} {list(bits.shape)}"
        )
    place = torch.tensor(_BIT_VALUES, dtype=torch.uint8, device=bits.device)
    flat = (bits[:, None] & place).ne(0).view(-1)
    if bool(flat[numel:].any()):
        raise ValueError("the bits after the last weight are not zero")
    return flat[:numel].view(shape)
