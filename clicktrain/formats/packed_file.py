"""Packed weights on disk: values and one bit a weight, in a plain safetensors file.

Layout, format version 1. For a packed weight ``conv1.weight`` of shape (F, C, R, S), or of any shape with two
dimensions or more, the file holds

* ``conv1.values``: the kept weights, [F, nnz_per_filter] if all filters keep equally many, else [nnz];
  within a filter in the order of the flat positions in C*R*S;
* ``conv1.keep_bits``: uint8 [ceil(F*C*R*S / 8)], bit i % 8 of byte i // 8 says whether weight i of the flat
  [F, C, R, S] is kept.

All other tensors are stored as they are. The metadata key ``clicktrain.packed`` holds the JSON
``{"version": 1, "weights": {"conv1.weight": {"shape": [F, C, R, S], "values": ..., "keep_bits": ...}}}``, the
last two being names of tensors. These names are those of a packed model's ``state_dict`` as well.

Size of the packed weights against dense float32: 1 / compression + 1/32 (1/16 for 16-bit weights).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.formats.packed import PackedWeight, Structure, pack_values
from clicktrain.formats.tree import reading_document, save_document

FORMAT_VERSION = 1

_KEY = "clicktrain.packed"


def save_packed(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a dense ``state_dict``, its pruned weights exactly zero, with these packed; whole or not at all.

    ``masks`` are bool, of the weight's shape, True = kept, by layer name (``conv1``) or weight name
    (``conv1.weight``).

    Raises:
        UserError: a mask fits no weight, a weight outside its mask is not zero, or the disk is full.
    """
    stored: dict[str, Tensor] = dict(tensors)
    weights: dict[str, Any] = {}
    for key, mask in masks.items():
        name = key if key in tensors else f"{key}.weight"
        structure, values = _pack(name, tensors, mask)
        stem = name.removesuffix(".weight")
        names = {"values": f"{stem}.values", "keep_bits": f"{stem}.keep_bits"}
        for taken in names.values():
            if taken in tensors:
                raise ValueError(f"the packed form of {name} needs the name {taken}, which is taken")
        del stored[name]
        stored[names["values"]] = values
        stored[names["keep_bits"]] = structure.bits()
        weights[name] = {"shape": list(tensors[name].shape), **names}
    save_document(path, stored, _KEY, {"version": FORMAT_VERSION, "weights": weights}, metadata)


def read_packed(path: str | os.PathLike[str]) -> tuple[dict[str, PackedWeight], dict[str, Tensor]]:
    """Read a packed file as it is.

    Returns:
        (packed, others): packed weights by weight name, and all other tensors; on the CPU.

    Raises:
        UserError: there is no such file, it is damaged, not a packed file, or of a newer version.
    """
    with reading_document(path, _KEY, FORMAT_VERSION, "one of packed weights") as (tensors, document):
        packed = {name: _unpack(name, entry, tensors) for name, entry in document["weights"].items()}
    return packed, tensors


def load_packed(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a packed file as the dense ``state_dict`` that it was made from; errors as `read_packed`."""
    packed, tensors = read_packed(path)
    return {**tensors, **{name: weight.to_dense() for name, weight in packed.items()}}


def _pack(name: str, tensors: Mapping[str, Tensor], mask: Tensor) -> PackedWeight:
    if name not in tensors:
        raise UserError(f"there is a mask for {name} but no such tensor")
    dense = tensors[name].detach()
    if mask.shape != dense.shape or mask.dtype != torch.bool or dense.dim() < 2:
        raise UserError(
            f"the mask of {name} is {mask.dtype} {list(mask.shape)}, its weight is {list(dense.shape)}; "
            "a mask is bool and of the weight's shape, with two dimensions or more"
        )
    mask = mask.to(dense.device)
    if bool((dense != 0).logical_and_(~mask).any()):
        raise UserError(f"{name} has nonzero weights outside its mask: prune it before it is packed")
    structure = Structure.from_mask(mask)
    return PackedWeight(structure, pack_values(structure, dense))


def _unpack(name: str, entry: Any, tensors: dict[str, Tensor]) -> PackedWeight:
    """Take a weight's tensors out of ``tensors`` and check that they belong together; ValueError if not."""
    shape = tuple(entry["shape"])
    if len(shape) < 2 or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{name} has no valid shape")
    if name in tensors:
        raise ValueError(f"{name} is there packed and dense")
    values, bits = tensors.pop(entry["values"]), tensors.pop(entry["keep_bits"])
    structure = Structure.from_bits(bits, shape)
    if tuple(values.shape) != structure.values_shape:
        raise ValueError(f"{name} keeps {structure.nnz} weights and has values of shape {list(values.shape)}")
    return PackedWeight(structure, values)
