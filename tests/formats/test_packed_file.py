"""Packed files: small, whole, checked."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.formats.packed_file import load_packed, read_packed, save_packed
from clicktrain.formats.tree import read_metadata, read_tensors, save_tensors, save_tree


def pruned(shape: tuple[int, ...], compression: float, equal: bool = True) -> tuple[Tensor, Tensor]:
    """A weight and its mask."""
    flat = torch.rand(shape).flatten(1)
    keep = round(flat.shape[1] / compression)
    mask = flat.argsort(1).argsort(1) < keep if equal else flat < 1 / compression
    mask = mask.view(shape)
    return torch.randn(shape) * mask, mask


def example() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    conv1, mask1 = pruned((8, 4, 3, 3), 4)
    conv2, mask2 = pruned((6, 5, 1, 1), 2, equal=False)
    tensors = {
        "features.0.weight": conv1,
        "features.0.bias": torch.randn(8),
        "conv2.weight": conv2.bfloat16(),
        "bn.num_batches_tracked": torch.tensor(7),
        "fc.weight": torch.randn(3, 6),
    }
    return tensors, {"features.0": mask1, "conv2.weight": mask2}


def test_round_trip(tmp_path: Path) -> None:
    tensors, masks = example()
    save_packed(tmp_path / "p", tensors, masks, {"note": "x"})
    loaded = load_packed(tmp_path / "p")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
    packed, others = read_packed(tmp_path / "p")
    assert torch.equal(packed["features.0.weight"].structure.mask(), masks["features.0"])
    assert torch.equal(packed["conv2.weight"].structure.mask(), masks["conv2.weight"])
    assert packed["features.0.weight"].values.shape == (8, 9)
    assert set(others) == {"features.0.bias", "bn.num_batches_tracked", "fc.weight"}
    assert read_metadata(tmp_path / "p")["note"] == "x"


def test_documented_layout(tmp_path: Path) -> None:
    weight = torch.tensor([[1.0, 0, 0, 2], [0, 3, 4, 0]]).view(2, 1, 2, 2)
    save_packed(tmp_path / "p", {"c.weight": weight}, {"c": weight != 0})
    tensors, metadata = read_tensors(tmp_path / "p")
    assert tensors["c.values"].tolist() == [[1, 2], [3, 4]]
    assert tensors["c.keep_bits"].tolist() == [0b01101001]
    assert json.loads(metadata["clicktrain.packed"]) == {
        "version": 1,
        "weights": {"c.weight": {"shape": [2, 1, 2, 2], "values": "c.values", "keep_bits": "c.keep_bits"}},
    }


def test_fully_connected_layers(tmp_path: Path) -> None:
    """Their own shape is in the metadata and comes back."""
    weight = torch.tensor([[1.0, 0, 2], [0, 3, 0]])
    tensors = {"fc.weight": weight, "fc.bias": torch.ones(2)}
    save_packed(tmp_path / "p", tensors, {"fc": weight != 0})
    assert torch.equal(load_packed(tmp_path / "p")["fc.weight"], weight)
    packed, others = read_packed(tmp_path / "p")
    assert packed["fc.weight"].structure.shape == (2, 3)
    assert packed["fc.weight"].values.tolist() == [1, 2, 3]
    assert set(others) == {"fc.bias"}
    document = json.loads(read_tensors(tmp_path / "p")[1]["clicktrain.packed"])
    assert document["weights"]["fc.weight"]["shape"] == [2, 3]


@pytest.mark.parametrize("compression", [2.25, 4, 10])
@pytest.mark.parametrize("equal", [True, False])
def test_size_of_the_file(compression: float, equal: bool, tmp_path: Path) -> None:
    """At most 1 / compression + 15% of the dense convolution bytes; the header is counted as well."""
    shapes = [(64, 32, 3, 3), (64, 64, 3, 3), (128, 64, 1, 1)]
    weights = {f"{i}.weight": pruned(shape, compression, equal) for i, shape in enumerate(shapes)}
    save_packed(
        tmp_path / "p",
        {name: weight for name, (weight, _) in weights.items()},
        {name: mask for name, (_, mask) in weights.items()},
    )
    dense = sum(4 * weight.numel() for weight, _ in weights.values())
    reached = sum(w.numel() for w, _ in weights.values()) / sum(int(m.sum()) for _, m in weights.values())
    assert reached == pytest.approx(compression, rel=0.05)
    assert (tmp_path / "p").stat().st_size <= dense * (1 / reached + 0.15)
    # What the documentation promises beside the header: values and one bit a weight.
    (header,) = struct.unpack("<Q", (tmp_path / "p").read_bytes()[:8])
    assert (tmp_path / "p").stat().st_size - 8 - header == pytest.approx(dense * (1 / reached + 1 / 32))


def test_masks_that_do_not_fit(tmp_path: Path) -> None:
    weight, mask = pruned((4, 2, 3, 3), 2)
    with pytest.raises(UserError, match=r"outside its mask"):
        save_packed(tmp_path / "p", {"c.weight": weight + 1}, {"c": mask})
    with pytest.raises(UserError, match=r"c\.weight is"):
        save_packed(tmp_path / "p", {"c.weight": weight}, {"c": mask[:2]})
    with pytest.raises(UserError, match=r"c\.weight is"):
        save_packed(tmp_path / "p", {"c.weight": weight}, {"c": mask.float()})
    with pytest.raises(UserError, match=r"mask for d\.weight but no"):
        save_packed(tmp_path / "p", {"c.weight": weight}, {"d": mask})
    with pytest.raises(ValueError, match="which is taken"):
        save_packed(tmp_path / "p", {"c.weight": weight, "c.values": weight}, {"c": mask})
    assert list(tmp_path.iterdir()) == []


def test_no_masks_is_a_dense_file(tmp_path: Path) -> None:
    save_packed(tmp_path / "p", {"a": torch.ones(2)}, {})
    assert torch.equal(load_packed(tmp_path / "p")["a"], torch.ones(2))


def test_foreign_and_cut_files(tmp_path: Path) -> None:
    tensors, masks = example()
    with pytest.raises(UserError, match="there is no file"):
        load_packed(tmp_path / "missing")
    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    save_tree(tmp_path / "tree", tensors)
    for name in ("foreign", "tree"):
        with pytest.raises(UserError, match="not one of packed weights"):
            load_packed(tmp_path / name)
    save_packed(tmp_path / "p", tensors, masks)
    whole = (tmp_path / "p").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "p").write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            load_packed(tmp_path / "p")


ENTRY = {"shape": [2, 1, 2, 2], "values": "c.values", "keep_bits": "c.keep_bits"}


def rewritten(tmp_path: Path, document: Any, **changes: Tensor | None) -> Path:
    """A packed file with other contents but whole."""
    tensors: dict[str, Tensor] = {
        "c.values": torch.ones(2, 2),
        "c.keep_bits": torch.tensor([0b01101001], dtype=torch.uint8),
    }
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[f"c.{name}"]
        else:
            tensors[f"c.{name}"] = tensor
    save_tensors(tmp_path / "p", tensors, {"clicktrain.packed": json.dumps(document)})
    return tmp_path / "p"


@pytest.mark.parametrize(
    "changes",
    [
        {"values": None},
        {"keep_bits": None},
        {"values": torch.ones(2, 3)},
        {"values": torch.ones(4)},
        {"keep_bits": torch.tensor([0b01101000], dtype=torch.uint8)},
        {"keep_bits": torch.tensor([0b01101001, 0], dtype=torch.uint8)},
        {"keep_bits": torch.tensor([105])},
        {"weight": torch.ones(2, 1, 2, 2)},
    ],
    ids=lambda c: f"{next(iter(c))}-{next(iter(c.values()))}",
)
def test_tensors_that_do_not_belong_together(changes: dict[str, Tensor | None], tmp_path: Path) -> None:
    path = rewritten(tmp_path, {"version": 1, "weights": {"c.weight": ENTRY}}, **changes)
    with pytest.raises(UserError, match="is damaged"):
        load_packed(path)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "damaged"),
        ({"version": 1}, "damaged"),
        ({"version": "1", "weights": {}}, "damaged"),
        ({"version": 1, "weights": []}, "damaged"),
        ({"version": 1, "weights": {"c.weight": {}}}, "damaged"),
        ({"version": 1, "weights": {"c.weight": {**ENTRY, "shape": [2, 1, 2]}}}, "damaged"),
        ({"version": 1, "weights": {"c.weight": {**ENTRY, "shape": [2, 1, 2, -2]}}}, "damaged"),
        ({"version": 1, "weights": {"c.weight": {**ENTRY, "shape": [2, 1, 3, 3]}}}, "damaged"),
        ({"version": 2, "weights": {}}, "update clicktrain"),
    ],
)
def test_wrong_documents(document: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_packed(rewritten(tmp_path, document))
