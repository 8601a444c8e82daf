"""The arguments of a model's ``forward``: positional, keyword, nested in tuples, lists and dicts.

The batch is the first dimension of the first tensor, and of every tensor that is as long.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """One call of ``forward``: ``model(*args, **kwargs)``.

    Arguments that are left out keep their defaults. Tensors may be nested in tuples, lists and dicts;
    whatever else an argument holds (numbers, strings, None) is a constant of the call.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def call(self, function: Callable[..., Any]) -> Any:
        """What the function gives for these arguments."""
        return function(*self.args, **self.kwargs)

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the arguments."""
        return tuple(leaf for _, leaf in self.leaves() if isinstance(leaf, Tensor))

    def constants(self) -> tuple[tuple[str, Any], ...]:
        """(place, value) of everything that is not a tensor."""
        return tuple((place, leaf) for place, leaf in self.leaves() if not isinstance(leaf, Tensor))

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """(place, value) of everything inside the arguments, such as ("0", x) and ("batch.image", x)."""
        for index, value in enumerate(self.args):
            yield from _leaves(str(index), value)
        for name, value in self.kwargs.items():
            yield from _leaves(name, value)

    def map(self, change: Callable[[Tensor], Any]) -> Inputs:
        """The same call with every tensor exchanged."""
        return Inputs(
            tuple(_map(value, change) for value in self.args),
            {name: _map(value, change) for name, value in self.kwargs.items()},
        )

    def ordinary(self) -> Inputs:
        """The same call with tensors that autograd can record; those made in inference mode are copied.

        Call it outside of inference mode.
        """
        return self.map(lambda tensor: tensor.clone() if tensor.is_inference() else tensor)

    def with_tensors(self, tensors: tuple[Any, ...]) -> Inputs:
        """The same call with other values in the places of its tensors, in order."""
        values = iter(tensors)
        return self.map(lambda _: next(values))


def as_inputs(example: Any, model: nn.Module | None = None) -> Inputs:
    """Read what users give as an example of a model's inputs.

    A tensor is the only argument; a tuple holds the positional arguments; a dict holds keyword arguments,
    unless the model's ``forward`` cannot be called with its keys as names: then it is the only argument, as
    is anything else, a list too. `Inputs` stay as they are: they can mix all kinds.
    """
    if isinstance(example, Inputs):
        return example
    if isinstance(example, tuple) and not hasattr(example, "_fields"):
        return Inputs(example)
    if isinstance(example, Mapping):
        keywords = {str(name): value for name, value in example.items()}
        if all(isinstance(name, str) for name in example) and (model is None or _fits(model, keywords)):
            return Inputs((), keywords)
    return Inputs((example,))


@torch.no_grad()
def layer_input_shapes(model: nn.Module, names: Iterable[str], inputs: Inputs) -> dict[str, list[torch.Size]]:
    """Run a model, and record the shape that each of these layers reads, call by call.

    Layers that are not called have no entry.
    """
    shapes: dict[str, list[torch.Size]] = {}

    def note(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shapes.setdefault(name, []).append((args[0] if args else next(iter(kwargs.values()))).shape)

    with contextlib.ExitStack() as hooks:
        for name in names:
            layer = model.get_submodule(name)
            hooks.enter_context(layer.register_forward_pre_hook(partial(note, name), with_kwargs=True))
        inputs.call(model)
    return shapes


def _fits(model: nn.Module, keywords: dict[str, Any]) -> bool:
    try:
        inspect.signature(model.forward).bind(**keywords)
    except (TypeError, ValueError):
        return False
    return True


def _leaves(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _leaves(f"{place}.{index}", item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(f"{place}.{name}", item)
    else:
        yield place, value


def _map(value: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        items = [_map(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_map(item, change) for item in value]
    if isinstance(value, dict):
        return {name: _map(item, change) for name, item in value.items()}
    return value


def first_tensor(inputs: Inputs) -> Tensor:
    """The images of a network for images: the first tensor with more than one dimension.

    Raises:
        UserError: there is no tensor among the arguments.
    """
    tensors = inputs.tensors()
    if not tensors:
        raise UserError(
            "the example holds no tensor: give a batch of inputs, a tuple of positional arguments or a dict "
            "of keyword arguments"
        )
    return next((tensor for tensor in tensors if tensor.dim() > 1), tensors[0])


def batch_size(inputs: Inputs) -> int:
    """Images in the batch; 0 where the first tensor is a number."""
    first = first_tensor(inputs)
    return first.shape[0] if first.dim() else 0


def first_of_batch(inputs: Inputs, images: int) -> Inputs:
    """The first images, as views."""
    return _batched(inputs, lambda tensor: tensor[:images])


def resized(inputs: Inputs, images: int) -> Inputs:
    """A batch of another size: the same images over and over."""
    size = batch_size(inputs)
    if size in (0, images):
        return inputs
    number = torch.arange(images) % size
    return _batched(inputs, lambda tensor: tensor.index_select(0, number.to(tensor.device)))


def blank(inputs: Inputs, images: int | None = None) -> Inputs:
    """Zeros instead of floating-point numbers; whole numbers (indices, masks) stay as they are."""
    whole = inputs if images is None else resized(inputs, images)
    return whole.map(lambda t: torch.zeros_like(t) if t.is_floating_point() or t.is_complex() else t)


def owned(inputs: Inputs) -> Inputs:
    """Tensors with memory of their own, outside of autograd."""
    return inputs.map(lambda tensor: tensor.detach().clone())


def _batched(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    size = batch_size(inputs)
    return inputs.map(lambda t: change(t) if size and t.dim() and t.shape[0] == size else t)
