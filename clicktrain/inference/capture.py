"""From a PyTorch module to a program: `torch.export` records it, each recorded operation is translated."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from clicktrain.inference.folding import fold
from clicktrain.inference.program import NotPortableError, Op, Program, Shape, Value
from clicktrain.inference.translations import PASSED, TRANSLATIONS, Arguments

_BATCH = 2  # not 1, which torch.export would take for a constant


def capture(model: nn.Module, image_shape: Sequence[int]) -> Program:
    """The program of a network in evaluation mode for images [C, H, W]; the network is not changed.

    Raises:
        NotPortableError: torch.export cannot record it, or it has an operation that no program has.
    """
    mode = [(module, module.training) for module in model.modules()]
    example = torch.zeros(
        _BATCH, *image_shape, dtype=next((p.dtype for p in model.parameters()), torch.float32)
    )
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # PyTorch's about itself
            recorded = torch.export.export(model.eval(), (example,), strict=False).run_decompositions({})
    except Exception as error:  # the network's own code may raise anything when it is recorded
        first = str(error).strip().split("\n")[0]
        raise NotPortableError(
            f"torch.export cannot record this network: {type(error).__name__}: {first}"
        ) from error
    finally:
        for module, training in mode:
            module.training = training
    return fold(_Reader(recorded).program())


class _Reader:
    """Goes through a recorded graph and writes operations."""

    def __init__(self, recorded: torch.export.ExportedProgram) -> None:
        self._recorded = recorded
        self._known: dict[fx.Node, Any] = {}
        self._ops: list[Op] = []

    def program(self) -> Program:
        signature = self._recorded.graph_signature
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        names.update(signature.inputs_to_lifted_tensor_constants)
        image: Value | None = None
        for node in self._recorded.graph.nodes:
            if node.op == "placeholder":
                if node.name in names:
                    self._known[node] = self._constant(names[node.name])
                elif image is None and isinstance(node.meta.get("val"), Tensor):
                    image = self._known[node] = Value(_shape(node), node.name)
                else:
                    raise NotPortableError(f"its forward takes more than images: {node.name}")
            elif node.op == "call_function":
                self._known[node] = self._translate(node)
            elif node.op == "output":
                results = [one for one in node.args[0] if one is not None]
                if len(results) != 1 or not isinstance(self._known.get(results[0]), Value) or image is None:
                    raise NotPortableError("a network for export has one output, which depends on the images")
                return Program(image, self._known[results[0]], self._ops)
            else:
                raise NotPortableError(f"its graph has {node.op} {node.target}")
        raise AssertionError("a graph ends with its output")

    def _constant(self, name: str) -> Tensor:
        tensors = {**self._recorded.state_dict, **self._recorded.constants}
        value: Tensor = tensors[name].detach()
        return value.double() if value.is_floating_point() else value

    def _translate(self, node: fx.Node) -> Any:
        found: Any = fx.map_arg(node.args, lambda one: self._known[one])
        named: Any = fx.map_arg(node.kwargs, lambda one: self._known[one])
        if node.target is operator.getitem:
            return found[0][found[1]]
        if not _depends(found) and not _depends(named):
            return node.target(*found, **named)  # type: ignore[operator]
        what, _, _ = str(node.target).removeprefix("aten.").partition(".")
        what = what.rstrip("_")
        arguments = Arguments(what, node.name, _bound(node, found, named), self._ops, _results(node))
        if what in PASSED:
            return arguments.first
        if what not in TRANSLATIONS:
            raise NotPortableError(f"its operation {node.target} ({_home(node)}) has no form in C")
        return TRANSLATIONS[what](arguments)


def _depends(arguments: Any) -> bool:
    found = False

    def look(one: Any) -> None:
        nonlocal found
        if isinstance(one, Value):
            found = True
        elif isinstance(one, (tuple, list)):
            for inside in one:
                look(inside)
        elif isinstance(one, dict):
            look(list(one.values()))

    look(arguments)
    return found


def _bound(node: fx.Node, found: Sequence[Any], named: dict[str, Any]) -> dict[str, Any]:
    """Arguments by the names of the operation's schema, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        raise NotPortableError(f"its graph calls {node.target}")
    bound = {}
    for place, argument in enumerate(schema.arguments):
        if place < len(found):
            bound[argument.name] = found[place]
        else:
            bound[argument.name] = named.get(argument.name, argument.default_value)
    return bound


def _results(node: fx.Node) -> list[Shape]:
    """Shapes of what an operation gives: one, or the parts of a list; of a tuple the first has the result."""
    value = node.meta.get("val")
    values = value if isinstance(value, list) else value[:1] if isinstance(value, tuple) else (value,)
    return [_shape_of(one, node) for one in values if isinstance(one, Tensor)]


def _shape(node: fx.Node) -> Shape:
    return _shape_of(node.meta["val"], node)


def _shape_of(value: Tensor, node: fx.Node) -> Shape:
    shape = tuple(value.shape)
    if value.dim() > 4 or value.dim() < 2 or shape[0] != _BATCH:
        raise NotPortableError(
            f"its value {node.name} ({_home(node)}) has the shape {[*shape]} for {_BATCH} images: C has "
            "batches of vectors and of images only"
        )
    if value.is_complex() or not value.is_floating_point():
        raise NotPortableError(f"its value {node.name} ({_home(node)}) is {value.dtype}, not floating point")
    if value.dim() == 3:
        return shape[1], 1, shape[2]
    return (shape[1], 1, 1) if value.dim() == 2 else (shape[1], shape[2], shape[3])


def _home(node: fx.Node) -> str:
    """The module that a node comes from, by its path."""
    stack = node.meta.get("nn_module_stack") or {}
    path = [str(entry[0]) for entry in stack.values() if isinstance(entry, tuple)]
    return (path[-1].removeprefix("L['self'].") if path else "") or "the network itself"
