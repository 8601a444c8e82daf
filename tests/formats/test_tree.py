"""Nested states on disk: back bit for bit, or refused in a sentence."""

from __future__ import annotations

import enum
import json
import math
import random
import struct
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.formats.tree import (
    flatten_tree,
    load_tree,
    read_metadata,
    read_tensors,
    save_tensors,
    save_tree,
    unflatten_tree,
)

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip
FLOAT_DTYPES = [dtype for dtype in DTYPES if dtype.is_floating_point]


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure and every bit."""
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and raw(a) == raw(b)
        )  # fmt: skip
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    count = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    high = 2 if dtype is torch.bool else 256
    values = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    tensor = values.view(dtype).reshape(shape)
    return tensor.transpose(0, -1) if draw(st.booleans()) and len(shape) > 1 else tensor


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors()
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(-3, 3), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(tree=TREES)
@settings(max_examples=30)
def test_round_trip_through_a_file(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    save_tree(path, tree, {"kind": "test"})
    assert same(load_tree(path), tree)
    assert read_metadata(path) == {"kind": "test"}


@given(tree=TREES)
@settings(max_examples=60)
def test_flattening_again_gives_the_same(tree: Any) -> None:
    """A checksum over the flat form is the same before saving and after loading."""
    flat, text = flatten_tree(tree)
    again, text_again = flatten_tree(unflatten_tree(flat, json.loads(json.dumps(text))))
    assert text == text_again
    assert same(flat, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (5, 3)], ids=str)
def test_dtypes_and_shapes(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = (torch.rand(shape) * 3).to(dtype)
    save_tree(tmp_path / "t", [tensor])
    assert same(load_tree(tmp_path / "t"), [tensor])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_special_floats_in_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.tensor([math.nan, math.inf, -math.inf, -0.0, torch.finfo(dtype).tiny], dtype=dtype)
    save_tree(tmp_path / "t", tensor)
    assert same(load_tree(tmp_path / "t"), tensor)


def test_bits_of_nan_and_signs_of_zero(tmp_path: Path) -> None:
    (odd_nan,) = struct.unpack(">d", bytes.fromhex("fff8000000000123"))
    values = [math.nan, odd_nan, math.inf, -math.inf, -0.0, 0.1, 5e-324]
    save_tree(tmp_path / "t", values)
    assert same(load_tree(tmp_path / "t"), values)


def test_views_parameters_and_shared_tensors_come_back_alone(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    parameter = nn.Parameter(base.clone())
    tree = {"base": base, "again": base, "row": base[1], "turned": base.t(), "parameter": parameter}
    flat, _ = flatten_tree(tree)
    assert len({t.untyped_storage().data_ptr() for t in flat.values()}) == len(flat)
    assert all(t.is_contiguous() and not t.requires_grad for t in flat.values())
    save_tree(tmp_path / "t", tree)
    loaded = load_tree(tmp_path / "t")
    assert all(torch.equal(loaded[key], tree[key]) for key in tree)
    loaded["base"].zero_()
    assert torch.equal(loaded["again"], base)
    assert type(loaded["parameter"]) is Tensor


def test_a_state_dict_keeps_its_names_for_every_other_reader(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    save_tree(tmp_path / "model.safetensors", model.state_dict())
    other = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert type(load_tree(tmp_path / "model.safetensors")) is dict


def test_keys_that_would_give_one_name(tmp_path: Path) -> None:
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    tree = {"a": {"b": one}, "a.b": two, "a.b#2": three, "__metadata__": one, "": two, 1: one, "1": two,
            "\ud800": three}  # fmt: skip
    save_tree(tmp_path / "t", tree)
    assert same(load_tree(tmp_path / "t"), tree)


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tree = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": {"torch": torch.get_rng_state(), "python": random.getstate()},
        "size": torch.Size([2, 3]),
        "best": np.float64(0.5),
    }
    save_tree(tmp_path / "t", tree)
    loaded = load_tree(tmp_path / "t")
    random.random()
    random.setstate(loaded["rng"]["python"])
    assert random.getstate() == tree["rng"]["python"]
    assert same(loaded["rng"]["torch"], torch.get_rng_state())
    assert same(loaded["model"], dict(tree["model"]))
    assert loaded["size"] == (2, 3)
    assert type(loaded["best"]) is float
    fresh = torch.optim.Adam(model.parameters(), amsgrad=True)
    fresh.load_state_dict(loaded["optimizer"])
    assert same(fresh.state_dict(), optimizer.state_dict())


class Color(enum.IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [{1, 2}, object(), 1j, b"bytes", np.ones(2), np.int64(1), Color.RED, Point(1, 2), nn.Linear(1, 1),
     torch.device("cpu"), torch.float32, lambda: 0, torch.ones(2, dtype=torch.complex64),
     torch.ones(2).to_sparse(), torch.ones(2, device="meta")],
    ids=lambda v: type(v).__name__,
)  # fmt: skip
def test_other_types_are_refused_by_path_and_nothing_is_written(value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^state\.0\.deep: a .* cannot be saved"):
        save_tree(tmp_path / "t", {"state": [{"deep": value}]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [1.5, None, True, (1, 2)])
def test_other_keys_are_refused(key: Any) -> None:
    with pytest.raises(TypeError, match="keys are str or int"):
        flatten_tree({"a": OrderedDict([(key, 1)])})


def test_metadata_are_strings(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="strings"):
        save_tree(tmp_path / "t", {}, {"epoch": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="taken"):
        save_tree(tmp_path / "t", {}, {"clicktrain.tree": "x"})
    assert list(tmp_path.iterdir()) == []


def test_a_cut_file_is_damaged_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "t"
    save_tree(path, {"a": torch.arange(10), "b": [1, "x"]})
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            load_tree(path)


def test_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        load_tree(tmp_path / "missing")
    with pytest.raises(UserError, match="there is no file"):
        read_metadata(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "pickle.pt")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_tree(tmp_path / "pickle.pt")
    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(UserError, match="not a state saved by clicktrain"):
        load_tree(tmp_path / "foreign")
    tensors, metadata = read_tensors(tmp_path / "foreign")
    assert same(tensors, {"a": torch.ones(2)})
    assert metadata == {}


def document(root: Any, version: Any = 1) -> str:
    return json.dumps({"version": version, "root": root})


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", document({"tensor": "gone"}), document({"float": "xx"}), document({"code": "print(1)"}),
     document({"items": [[1]]}), document({"items": [[None, 1]]}), document(1, "one"), document({}),
     document({"tuple": [], "dict": {}}), "[" * 100_000],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_a_wrong_tree_in_a_whole_file_is_damaged(text: str, tmp_path: Path) -> None:
    save_tensors(tmp_path / "t", {"a": torch.ones(1)}, {"clicktrain.tree": text})
    with pytest.raises(UserError, match="is damaged"):
        load_tree(tmp_path / "t")


def test_a_newer_version(tmp_path: Path) -> None:
    save_tensors(tmp_path / "t", {}, {"clicktrain.tree": document([], 2)})
    with pytest.raises(UserError, match=r"format version 2.*update"):
        load_tree(tmp_path / "t")


def test_the_layout_that_is_documented(tmp_path: Path) -> None:
    """Files of today must stay readable: the bytes' meaning is fixed here."""
    tree = {"w": torch.ones(2), "n": [1, 2.5, None, (True,), math.inf], 3: "x"}
    save_tree(tmp_path / "t", tree)
    _, metadata = read_tensors(tmp_path / "t")
    assert json.loads(metadata["clicktrain.tree"]) == {
        "version": 1,
        "root": {
            "items": [
                ["w", {"tensor": "w"}],
                ["n", [1, 2.5, None, {"tuple": [True]}, {"float": "7ff0000000000000"}]],
                [3, "x"],
            ]
        },
    }
