"""Nested states as one safetensors file: tensors as tensors, the rest as JSON; reading executes nothing.

Layout of a file, format version 1: the safetensors format as published, whose metadata holds, under
``clicktrain.tree``, the JSON ``{"version": 1, "root": node}``. A node is

* null, true, false, a whole or finite number, a string: itself;
* a JSON list: a list of nodes;
* ``{"dict": {key: node}}``: a dict with string keys;
* ``{"items": [[key, node], ...]}``: a dict with int keys as well;
* ``{"tuple": [node, ...]}``;
* ``{"float": "7ff8000000000000"}``: NaN or an infinity, as the 16 hex digits of its IEEE bits;
* ``{"tensor": name}``: the tensor of that name in the file. The name is the path of keys joined by dots, so
  a ``state_dict`` is readable under its own names by any safetensors reader.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clicktrain.errors import UserError, shortened
from clicktrain.formats.atomic import append_jsonl, remove_leftovers, replace_file, write_text_atomic

__all__ = [
    "Json",
    "Tree",
    "append_jsonl",
    "flatten_tree",
    "load_tree",
    "read_metadata",
    "read_tensors",
    "remove_leftovers",
    "save_tensors",
    "save_tree",
    "unflatten_tree",
    "write_text_atomic",
]

Json: TypeAlias = Any
"""None, bool, int, float, str, and lists and string-keyed dicts of them."""

Tree: TypeAlias = Any
"""Tensor, None, bool, int, float, str, and lists, tuples and dicts (str or int keys) of trees."""

FORMAT_VERSION = 1

_TREE_KEY = "clicktrain.tree"
_DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


def flatten_tree(obj: Tree) -> tuple[dict[str, Tensor], Json]:
    """Take a nested state apart into tensors and JSON.

    Returns:
        (tensors, json): the tensors are detached, contiguous, on their device, and share no memory with each
        other (they may with ``obj``); the JSON is as in the module's documentation.

    Raises:
        TypeError: something in the state is of a type that a file cannot hold; the message has its path.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _take_apart(obj, (), tensors, set())


def unflatten_tree(tensors: Mapping[str, Tensor], json: Json) -> Tree:
    """Inverse of `flatten_tree`, bit for bit; dict subclasses come back as dict, Parameters as Tensor.

    Raises:
        ValueError: the JSON is not one that `flatten_tree` makes, or names a tensor that is not there.
    """
    match json:
        case None | bool() | int() | float() | str():
            return json
        case list():
            return [unflatten_tree(tensors, node) for node in json]
        case {"tensor": str(name), **rest} if not rest and name in tensors:
            return tensors[name]
        case {"float": str(digits), **rest} if not rest and len(digits) == 16:
            (value,) = struct.unpack(">d", bytes.fromhex(digits))
            return value
        case {"tuple": list(nodes), **rest} if not rest:
            return tuple(unflatten_tree(tensors, node) for node in nodes)
        case {"dict": dict(nodes), **rest} if not rest:
            return {key: unflatten_tree(tensors, node) for key, node in nodes.items()}
        case {"items": list(pairs), **rest} if not rest:
            return {_key(pair): unflatten_tree(tensors, pair[1]) for pair in pairs}
        case _:
            raise ValueError(f"not a node of a tree: {str(json)[:80]}")


def save_tree(path: str | os.PathLike[str], obj: Tree, metadata: Mapping[str, str] | None = None) -> None:
    """Write a nested state as one .safetensors file, whole or not at all, in a folder that exists.

    ``metadata`` are strings to put beside it; `read_metadata` reads them without loading a tensor.

    Raises:
        TypeError: the state holds something that a file cannot hold; nothing is written.
        UserError: the disk is full; nothing is left behind.
    """
    tensors, root = flatten_tree(obj)
    save_document(path, tensors, _TREE_KEY, {"version": FORMAT_VERSION, "root": root}, metadata)


def save_document(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    key: str,
    document: Json,
    metadata: Mapping[str, str] | None,
) -> None:
    """`save_tensors` with a JSON document among the metadata, under a key that is the format's own."""
    extra = dict(metadata or {})
    if key in extra:
        raise ValueError(f"the metadata key {key!r} is taken by the format itself")
    save_tensors(path, tensors, {**extra, key: json.dumps(document, allow_nan=False)})


def load_tree(path: str | os.PathLike[str]) -> Tree:
    """Read what `save_tree` wrote; tensors on the CPU, each with memory of its own.

    Raises:
        UserError: there is no such file, it is damaged, not a tree, or of a newer version.
    """
    what = "a state saved by clicktrain"
    with reading_document(path, _TREE_KEY, FORMAT_VERSION, what) as (tensors, document):
        return unflatten_tree(tensors, document["root"])


@contextlib.contextmanager
def reading_document(
    path: str | os.PathLike[str], key: str, newest: int, what: str
) -> Iterator[tuple[dict[str, Tensor], Any]]:
    """The tensors and the document of `save_document`; an error while they are used is one of the file's.

    Raises:
        UserError: there is no such file, it is damaged, without the document, or of a newer version.
    """
    tensors, metadata = read_tensors(path)
    if key not in metadata:
        raise UserError(f"{path} is a safetensors file but not {what}")
    try:
        document = json.loads(metadata[key])
        if (version := document["version"]) > newest:
            raise UserError(
                f"{path} has format version {version}, this version of clicktrain reads up to {newest}: "
                "update clicktrain"
            )
        yield tensors, document
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings beside a saved state; no tensor is loaded. Errors as `load_tree`."""
    with _reading(path) as file:
        metadata = dict(file.metadata() or {})
    metadata.pop(_TREE_KEY, None)
    return metadata


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors (on the CPU, memory of their own) and all metadata of any safetensors file.

    Raises:
        UserError: there is no such file, or it is not a whole safetensors file.
    """
    with _reading(path) as file:
        # Cloned: what the library hands out may be a map of the file, which must not be cut under it.
        return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, whole or not at all.

    Unlike the library's writer, this one brings one tensor at a time to the CPU and makes no copy of the
    file in memory, and a full disk has an error of its own.

    Raises:
        TypeError: a tensor's dtype or layout, or a metadata value, has no place in the format.
        UserError: the disk is full; nothing is left behind.
    """
    for key, value in metadata.items():
        if type(key) is not str or type(value) is not str:
            raise TypeError(f"metadata are strings, got {key!r}: {type(value).__name__}")
    # Wide types first, as the format's own writer does: then every tensor lies aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in order:
        tensor = tensors[name]
        _check_tensor(tensor, name)
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with replace_file(path) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def _take_apart(obj: Tree, path: tuple[str, ...], tensors: dict[str, Tensor], memory: set[int]) -> Json:
    if obj is None or type(obj) in (bool, int, str):
        return obj
    if isinstance(obj, float):
        return float(obj) if math.isfinite(obj) else {"float": struct.pack(">d", obj).hex()}
    if isinstance(obj, Tensor):
        return {"tensor": _add_tensor(obj, path, tensors, memory)}
    if isinstance(obj, dict):
        for key in obj:
            if type(key) not in (str, int):
                raise TypeError(f"{_where(path)}: keys are str or int, got {type(key).__name__} {key!r}")
        nodes = [(key, _take_apart(value, (*path, str(key)), tensors, memory)) for key, value in obj.items()]
        if all(type(key) is str for key, _ in nodes):
            return {"dict": dict(nodes)}
        return {"items": [list(node) for node in nodes]}
    if type(obj) in (list, tuple, torch.Size):
        items = [_take_apart(value, (*path, str(i)), tensors, memory) for i, value in enumerate(obj)]
        return items if type(obj) is list else {"tuple": items}
    raise TypeError(
        f"{_where(path)}: a {type(obj).__module__}.{type(obj).__qualname__} cannot be saved; "
        "a state is made of tensors, numbers, strings, None, lists, tuples and dicts"
    )


def _add_tensor(tensor: Tensor, path: tuple[str, ...], tensors: dict[str, Tensor], memory: set[int]) -> str:
    _check_tensor(tensor, _where(path))
    stem = ".".join(path).encode("utf-8", "replace").decode("utf-8")
    if stem in ("", "__metadata__"):  # the format's own names
        stem = f"tensor{stem}"
    name, count = stem, 1
    while name in tensors:
        count += 1
        name = f"{stem}#{count}"
    plain = tensor.detach().contiguous()
    address = plain.untyped_storage().data_ptr()
    if address in memory:
        plain = plain.clone(memory_format=torch.contiguous_format)
        address = plain.untyped_storage().data_ptr()
    memory.add(address)
    tensors[name] = plain
    return name


def _check_tensor(tensor: Tensor, where: str) -> None:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _DTYPE_NAMES:
        raise TypeError(
            f"{where}: a tensor of dtype {tensor.dtype} and layout {tensor.layout} on {tensor.device} "
            "cannot be saved"
        )


def _where(path: tuple[str, ...]) -> str:
    return ".".join(path) or "the state itself"


def _key(pair: Json) -> str | int:
    if type(pair) is not list or len(pair) != 2 or type(pair[0]) not in (str, int):
        raise ValueError(f"not a key and a node: {str(pair)[:80]}")
    key: str | int = pair[0]
    return key


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[Any]:
    """`safe_open` whose errors name the file in a sentence."""
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")
    try:
        file: Any = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {shortened(str(error), 200)}") from None
    with file:
        yield file
