"""Packing a dense weight with a frozen mask, beside CSR conversion (section 5.1)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from clicktrain.bench.masks import check_sparsity, pattern_mask
from clicktrain.bench.timing import WrongResultError, check_rounds, median_ms
from clicktrain.bench.timing import to_json as to_json
from clicktrain.errors import UserError
from clicktrain.formats.packed import Structure, pack_values

REPEAT = 20
"""Calls within one timing: one alone takes microseconds."""


@dataclass(frozen=True, slots=True)
class PackRow:
    """Three ways from a dense weight, filters x weights of one filter, to the values that are kept.

    `pack_values` and ``torch.masked_select`` know the positions, ``Tensor.to_sparse_csr`` finds them each
    time; the ratios are of CSR and of masked_select over packing.
    """

    case: str
    density: float
    pack_ms: float
    csr_ms: float
    masked_select_ms: float
    ratio: float
    ratio_masked_select: float


def bench_pack(
    filters: int = 256,
    channels: int = 128,
    *,
    sparsities: tuple[float, ...] = (0.75, 0.9),
    rounds: int = 15,
    seed: int = 0,
) -> list[PackRow]:
    """Time the conversion of a weight [filters, channels, 3, 3]; the paper's case by default.

    ``sparsities`` are shares of zeros; medians are taken of ``rounds`` timings.

    Raises:
        UserError: a setting that cannot be.
        WrongResultError: the three do not give the same values.
    """
    check_rounds(rounds)
    if filters < 1 or channels < 1:
        raise UserError(f"filters and channels must be at least 1, not {filters} and {channels}")
    for sparsity in sparsities:
        if not 0 < sparsity < 1:
            raise UserError(f"sparsity is {sparsity:g}: a share of zeros between 0 and 1, such as 0.9")
    compressions = tuple(round(1 / (1 - sparsity), 6) for sparsity in sparsities)
    check_sparsity(compressions, (1,))
    return [_row(filters, channels, compression, rounds, seed) for compression in compressions]


def _row(filters: int, channels: int, compression: float, rounds: int, seed: int) -> PackRow:
    generator = torch.Generator().manual_seed(seed)
    mask = pattern_mask((filters, channels, 3, 3), compression, 1, generator)
    # No kept value may be zero by chance: the conversion to CSR would drop it.
    weight = (torch.rand(mask.shape, generator=generator) + 0.5) * mask
    structure = Structure.from_mask(mask)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        _check(structure, weight, mask)
        times = median_ms(
            {
                "pack": lambda: pack_values(structure, weight),
                "csr": lambda: weight.view(filters, -1).to_sparse_csr(),
                "masked_select": lambda: torch.masked_select(weight, mask),
            },
            rounds,
            repeat=REPEAT,
        )
    pack = times["pack"]
    return PackRow(
        case=f"{filters}x{channels * 9}",
        density=structure.density,
        pack_ms=pack,
        csr_ms=times["csr"],
        masked_select_ms=times["masked_select"],
        ratio=times["csr"] / pack,
        ratio_masked_select=times["masked_select"] / pack,
    )


def _check(structure: Structure, weight: Tensor, mask: Tensor) -> None:
    packed = pack_values(structure, weight).flatten()
    csr = weight.view(weight.shape[0], -1).to_sparse_csr()
    if not torch.equal(packed, csr.values()) or not torch.equal(packed, torch.masked_select(weight, mask)):
        raise WrongResultError("packed values are not those of the CSR matrix")
