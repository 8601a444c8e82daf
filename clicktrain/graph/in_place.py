"""Operations that write into their input: who reads the written value, and how to write elsewhere instead."""

from __future__ import annotations

import operator

from torch import fx, nn

_ASSIGNMENTS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_METHODS = {
    "add_": "add", "sub_": "sub", "mul_": "mul", "div_": "div", "relu_": "relu", "clamp_": "clamp",
    "sigmoid_": "sigmoid", "tanh_": "tanh", "masked_fill_": "masked_fill",
}  # fmt: skip


def changes_in_place(node: fx.Node) -> bool:
    """Whether a node is an augmented assignment such as ``x += y`` or its method ``x.add_(y)``."""
    if node.op == "call_function":
        return node.target in _ASSIGNMENTS
    return node.op == "call_method" and str(node.target) in ("add_", "sub_", "mul_", "div_")


def later_uses_see_changes(graph: fx.Graph, model: nn.Module) -> None:
    """After an operation in place, later users of the old value are users of the new one."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        if isinstance(first, fx.Node) and writes_into_input(node, model):

            def later(user: fx.Node, place: int = order[node]) -> bool:
                return order[user] > place

            first.replace_all_uses_with(node, later)


def writes_into_input(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node writes into its first argument, in any spelling."""
    target = str(node.target)
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return (
        changes_in_place(node)
        or (node.op == "call_method" and target.endswith("_") and not target.endswith("__"))
        or (name.endswith("_") and not name.endswith("__"))
        or node.kwargs.get("inplace") is True
        or (node.op == "call_module" and getattr(model.get_submodule(target), "inplace", False) is True)
    )


def changes(node: fx.Node) -> bool:
    """Whether a node that is no layer gives its first argument, changed."""
    return (node.op == "call_function" and node.target in _ASSIGNMENTS) or str(node.target) in _METHODS


def write_elsewhere(graph: fx.Graph) -> None:
    """Let functions and methods write into new tensors; layers go on working in place.

    What writes into a buffer or a parameter does so still: that is what it is for.
    """
    lasting: set[fx.Node] = set()
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        if node.op == "get_attr" or (isinstance(first, fx.Node) and first in lasting and changes(node)):
            lasting.add(node)
        elif node.op == "call_function" and node.target in _ASSIGNMENTS:
            node.target = _ASSIGNMENTS[node.target]
        elif node.op == "call_method":
            node.target = _METHODS.get(str(node.target), node.target)
        if node.kwargs.get("inplace") is True:
            node.kwargs = {**node.kwargs, "inplace": False}
