"""Everything that calls of a network do: outputs, gradients, buffers, attributes, random numbers.

Two implementations of one network are the same function if all of that is the same, twice in a row: what a
call leaves behind (a step counter, a buffer) may only show in the next one.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.graph.copying import HOOK_TABLES
from clicktrain.graph.inputs import Inputs
from clicktrain.graph.random_state import own_random_numbers, random_state

CALLS = 2
_SEED = 20210614
_TABLES = frozenset(nn.Module().__dict__) - {"training"} | frozenset(HOOK_TABLES)


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """What one call did.

    Attributes:
        output: as ``forward`` gave it, tensors detached.
        inputs: the tensors that it got, afterwards.
        gradients: of a weighted sum of all outputs, by the name of a parameter or the place of an input;
            of the last call only, {} before.
        buffers: afterwards, by name.
        attributes: by path and name, what modules hold beside parameters, buffers and modules.
        random: where the random generators stand.
    """

    output: Any
    inputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    attributes: dict[str, Any]
    random: tuple[Any, ...]


def observe(
    model: nn.Module, function: Callable[..., Any], inputs: Inputs, *, calls: int = CALLS
) -> list[Observation]:
    """Call a function of a model some times, the last time backward as well, from fixed random numbers on.

    Args:
        model: a working copy: its buffers and attributes change, its gradients go.
        function: takes the arguments of ``forward`` and computes with the model's tensors.
        inputs: of each call; they stay as they are.
        calls: how many.

    Returns:
        One observation for each call.
    """
    result = []
    with own_random_numbers((*inputs.tensors(), *model.parameters())), torch.enable_grad():
        torch.manual_seed(_SEED)
        random.seed(_SEED)
        _seed_numpy()
        for left in reversed(range(calls)):
            result.append(_call(model, function, inputs, backward=left == 0))
    return result


def _call(model: nn.Module, function: Callable[..., Any], inputs: Inputs, *, backward: bool) -> Observation:
    leaves, given = [], []
    for tensor in inputs.tensors():
        leaf = tensor.detach().clone()
        leaves.append(leaf.requires_grad_() if leaf.is_floating_point() else leaf)
        # Not the leaf itself: a layer may work in place.
        given.append(leaf.clone() if leaf.requires_grad else leaf)
    output = inputs.with_tensors(tuple(given)).call(function)
    drawn = random_state()
    wanted: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted |= {str(index): leaf for index, leaf in enumerate(leaves) if leaf.requires_grad}
    gradients = _gradients([t for _, t in tensors_in(output)], wanted) if backward else {}
    return Observation(
        _detached(output),
        tuple(tensor.detach() for tensor in given),
        gradients,
        {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        dict(_attributes(model)),
        drawn,
    )


def _gradients(outputs: list[Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor | None]:
    trained = [t for t in outputs if t.requires_grad and t.is_floating_point()]
    if not trained or not wanted:
        return dict.fromkeys(wanted)
    weights = []
    for tensor in trained:
        generator = torch.Generator().manual_seed(_SEED)
        noise = torch.randn(tensor.shape, generator=generator)
        weights.append(noise.to(tensor.device, tensor.dtype))
    # Not autograd.grad, which reentrant checkpoints refuse.
    for tensor in wanted.values():
        tensor.grad = None
    try:
        torch.autograd.backward(trained, weights)
    except Exception:  # a network that is only evaluated need not have gradients
        return {}
    found = {name: tensor.grad for name, tensor in wanted.items()}
    for tensor in wanted.values():
        tensor.grad = None
    return found


def tensors_in(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested tuples, lists, dicts and objects with attributes, with their places."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from tensors_in(item, f"{place}.{name}")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from tensors_in(item, f"{place}.{index}")
    elif hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) and not callable(value):
        for name, item in vars(value).items():
            yield from tensors_in(item, f"{place}.{name}")


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, tuple):
        items = [_detached(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_detached(item) for item in value]
    if isinstance(value, dict):
        return type(value), {name: _detached(item) for name, item in value.items()}
    return value


def _attributes(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name not in _TABLES:
                yield f"{path}.{name}", _recorded(value, 0)


def _recorded(value: Any, depth: int) -> Any:
    """A value as something that can be compared later; None for what is not compared."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, random.Random):
        return str(hash(value.getstate()))
    if type(value).__module__.startswith("numpy.random"):
        return str(getattr(getattr(value, "bit_generator", None), "state", None))
    if depth > 4 or isinstance(value, (nn.Module, type)) or callable(value):
        return None
    if isinstance(value, dict):
        return {str(name): _recorded(item, depth + 1) for name, item in list(value.items())[:1000]}
    if isinstance(value, (list, tuple)) or type(value).__name__ == "deque":
        return [_recorded(item, depth + 1) for item in list(value)[:1000]]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if hasattr(value, "__dict__"):
        return {name: _recorded(item, depth + 1) for name, item in vars(value).items()}
    return None


def _seed_numpy() -> None:
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(_SEED)
