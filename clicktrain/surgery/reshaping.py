"""Channels through operations on shapes: flatten, view, permute, squeeze, expand, indexing, pixel means."""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch import fx, nn

from clicktrain.surgery.atoms import Atoms, Channels, SizeOf
from clicktrain.surgery.graph import NetworkGraph


class UnclearError(Exception):
    """Why it is not known where the channels go; the message becomes the reason why they stay."""


class Flow(Protocol):
    """What these rules need of `flow.ChannelFlow`."""

    graph: NetworkGraph
    atoms: Atoms
    sizes: dict[fx.Node, SizeOf]


def reshape(flow: Flow, node: fx.Node, x: Channels) -> Channels:
    """Flatten, view, reshape: the channels stay whole, or merge with the dimensions after them.

    [N, C, H, W] -> [N, C * H * W]: channel c becomes the indices ``c * H * W`` up to ``(c + 1) * H * W``.
    """
    source, result = _shapes(flow, node)
    before = math.prod(source[: x.dim])
    for dim, size in enumerate(result):
        if math.prod(result[:dim]) != before or size < source[x.dim] or size % source[x.dim]:
            continue
        repeat = size // source[x.dim]
        if repeat == 1 and source[x.dim] == 1 and dim != min(x.dim, len(result) - 1):
            continue
        after = source[x.dim + 1 :]
        if repeat not in {math.prod(after[:k]) for k in range(len(after) + 1)}:
            continue
        _check_written_size(flow, node, dim, result, x)
        return Channels(dim, tuple(i for i in x.ids for _ in range(repeat)))
    raise UnclearError(f"{_name(node)} mixes channels with other dimensions")


def permute(flow: Flow, node: fx.Node, x: Channels) -> Channels:
    """Permute, transpose, movedim."""
    source, _ = _shapes(flow, node)
    rank = len(source)
    name = _name(node).removesuffix("_")
    numbers = _integers(node.args[1:])
    if name == "permute" and len(numbers) == rank:
        return Channels([n % rank for n in numbers].index(x.dim), x.ids)
    if name == "transpose" and len(numbers) == 2:
        a, b = (n % rank for n in numbers)
        return Channels({a: b, b: a}.get(x.dim, x.dim), x.ids)
    raise UnclearError(f"{name} in a form that is not understood")


def squeeze(flow: Flow, node: fx.Node, x: Channels) -> Channels:
    """Squeeze of dimensions of size 1 that are not the channels'."""
    source, result = _shapes(flow, node)
    numbers = _dims(node)
    gone = {n % len(source) for n in numbers} if numbers else set(range(len(source)))
    gone = {d for d in gone if source[d] == 1}
    if x.dim in gone or len(result) != len(source) - len(gone) or 0 in gone:
        raise UnclearError("squeeze takes the dimension of the channels or of the batch away")
    if not numbers and len(x.ids) > 1:
        # Without a dimension it would take the channels away once only one of them is left.
        raise UnclearError("squeeze without a dimension takes the channels away where only one is left")
    return Channels(x.dim - sum(d < x.dim for d in gone), x.ids)


def unsqueeze(flow: Flow, node: fx.Node, x: Channels) -> Channels:
    """Unsqueeze."""
    _, result = _shapes(flow, node)
    numbers = _dims(node)
    if len(numbers) != 1:
        raise UnclearError("unsqueeze in a form that is not understood")
    return Channels(x.dim + (numbers[0] % len(result) <= x.dim), x.ids)


def expand(flow: Flow, node: fx.Node, x: Channels) -> Channels:
    """Expand of other dimensions than the channels'."""
    source, result = _shapes(flow, node)
    dim = x.dim + len(result) - len(source)
    if result[dim] != source[x.dim]:
        raise UnclearError("expand repeats a channel")
    if _name(node) == "expand":
        _check_written_size(flow, node, dim, result, x)
    return Channels(dim, x.ids)


def getitem(flow: Flow, node: fx.Node, x: Channels) -> Channels:
    """Indexing that leaves the channels whole: ``x[:, :, 0]``, ``x[..., None]``, ``x[:, :, ::2, ::2]``."""
    source, _ = _shapes(flow, node)
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    places = sum(i is not None and i is not Ellipsis for i in index)
    dim, result = 0, 0
    for item in index:
        if item is None:
            result += 1
            continue
        if item is Ellipsis:
            skipped = len(source) - places
            if dim <= x.dim < dim + skipped:
                return Channels(result + x.dim - dim, x.ids)
            dim, result = dim + skipped, result + skipped
            continue
        if not isinstance(item, (int, slice)):
            raise UnclearError("indexing with a tensor")
        if dim == x.dim:
            if item != slice(None):
                raise UnclearError("indexing picks out channels by their numbers")
            return Channels(result, x.ids)
        dim, result = dim + 1, result + isinstance(item, slice)
    return Channels(result + x.dim - dim, x.ids)


def reduced(flow: Flow, node: fx.Node, x: Channels) -> Channels:
    """Mean, sum, extremes over other dimensions than the channels' (global pooling)."""
    source, result = _shapes(flow, node)
    given = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    numbers = _integers([given] if given is not None else [])
    gone = {n % len(source) for n in numbers}
    if not numbers or x.dim in gone:
        raise UnclearError(f"{_name(node)} goes over the channels")
    return Channels(x.dim - (0 if len(result) == len(source) else sum(d < x.dim for d in gone)), x.ids)


def _check_written_size(flow: Flow, node: fx.Node, dim: int, result: tuple[int, ...], x: Channels) -> None:
    """The number of channels must not be written into the code: it would be wrong after surgery."""
    name = _name(node)
    if node.op == "call_module" or name == "flatten" or len(x.ids) <= 1:
        return
    sizes: Any = node.args[1:] if len(node.args) > 1 else node.kwargs.get("shape", node.kwargs.get("size"))
    if isinstance(sizes, tuple) and len(sizes) == 1 and not isinstance(sizes[0], int):
        whole = sizes[0]
        if isinstance(whole, (tuple, list)):
            sizes = tuple(whole)
        elif isinstance(whole, fx.Node) and isinstance(flow.graph.sizes.get(whole), tuple):
            raise UnclearError(f"{name} takes the whole shape of another value")
    if not isinstance(sizes, tuple) or len(sizes) != len(result):
        raise UnclearError(f"{name} in a form that is not understood")
    size = sizes[dim]
    if isinstance(size, int):
        # -1 is worked out from what is there; if it stands elsewhere, this number must follow the channels.
        if size != -1:
            raise UnclearError(f"{name} has the number {size} written into the code, which would not follow")
        others = [s for d, s in enumerate(sizes) if d != dim and isinstance(s, fx.Node) and s in flow.sizes]
        if others:
            raise UnclearError(f"{name} computes with the number of channels")
        return
    known = flow.sizes.get(size)
    if known is None:
        raise UnclearError(f"{name} takes a size that is not known to follow the channels")
    if known.exact and len(known.ids) == len(x.ids):
        flow.atoms.unite(known.ids, x.ids)
    elif {flow.atoms.find(i) for i in known.ids} != {flow.atoms.find(i) for i in x.ids}:
        raise UnclearError(f"{name} takes a size that is not known to follow the channels")


def _shapes(flow: Flow, node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return flow.graph.shapes[source], flow.graph.shapes[node]


def _dims(node: fx.Node) -> list[int]:
    return _integers([*node.args[1:], *([node.kwargs["dim"]] if "dim" in node.kwargs else [])])


def _integers(values: Any) -> list[int]:
    """All whole numbers in nested lists; other things are not understood."""
    numbers: list[int] = []
    for value in values:
        if isinstance(value, (tuple, list)):
            numbers += _integers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            numbers.append(value)
        elif not isinstance(value, bool):
            raise UnclearError("a dimension that is not written as a number")
    return numbers


def _name(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return str(name) if node.op != "call_module" else nn.Flatten.__name__.lower()
