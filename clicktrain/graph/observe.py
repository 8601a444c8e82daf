"""Everything that calls of a network do: outputs, gradients, buffers, attributes, random numbers.

Two implementations of one network are the same function if all of that is the same, twice in a row: what a
call leaves behind (a step counter, a buffer) may only show in the next one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.graph.copying import HOOK_TABLES, contents
from clicktrain.graph.inputs import Inputs
from clicktrain.graph.random_state import own_random_numbers, random_state, same_random_state

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
    """
    with own_random_numbers((*inputs.tensors(), *model.parameters()), _SEED), torch.enable_grad():
        return [_call(model, function, inputs, backward=left == 0) for left in reversed(range(calls))]


def _call(model: nn.Module, function: Callable[..., Any], inputs: Inputs, *, backward: bool) -> Observation:
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs.tensors()]
    # Not the leaves themselves: a layer may work in place.
    given = [leaf.clone() if leaf.requires_grad else leaf for leaf in leaves]
    output = inputs.with_tensors(tuple(given)).call(function)
    drawn = random_state()
    wanted: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted |= {str(index): leaf for index, leaf in enumerate(leaves) if leaf.requires_grad}
    gradients = _gradients(tensors_in(output), wanted) if backward else {}
    attributes = {
        f"{path}.{name}": _recorded(value, 0)
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if name not in _TABLES
    }
    return Observation(
        _detached(output),
        tuple(tensor.detach() for tensor in given),
        gradients,
        {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        attributes,
        drawn,
    )


def _gradients(outputs: list[Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor | None]:
    trained = [t for t in outputs if t.requires_grad and t.is_floating_point()]
    if not trained or not wanted:
        return dict.fromkeys(wanted)
    weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(_SEED)).to(t) for t in trained]
    # Not autograd.grad, which reentrant checkpoints refuse.
    for tensor in wanted.values():
        tensor.grad = None
    try:
        torch.autograd.backward(trained, weights)
    except Exception:  # a network that is only evaluated need not have gradients
        return {}
    gradients = {name: tensor.grad for name, tensor in wanted.items()}
    for tensor in wanted.values():
        tensor.grad = None
    return gradients


def placed_tensors(value: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested tuples, lists, dicts and objects with attributes, with their places."""
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from placed_tensors(item, f"{place}.{name}")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from placed_tensors(item, f"{place}.{index}")
    elif (hasattr(value, "__dict__") or is_dataclass(value)) and not callable(value):
        for name, item in contents(value).items():
            yield from placed_tensors(item, f"{place}.{name}")


def tensors_in(value: Any) -> list[Tensor]:
    """The same without their places."""
    return [tensor for _, tensor in placed_tensors(value)]


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


Close = Callable[[Tensor, Tensor, float], bool]


def difference(
    tried: Sequence[Observation], expected: Sequence[Observation], close: Close | None = None
) -> str:
    """What one of two implementations does otherwise, in words; "" if nothing.

    Args:
        tried: calls of the one in question.
        close: whether two floating-point tensors of one shape count as the same, of which differences up to
            the third argument are nothing; as good as equal by default.
    """
    close = close or nearly_equal
    for mine, theirs in zip(tried, expected, strict=True):
        if not same_random_state(mine.random, theirs.random):
            return "other random numbers"
        if not same(mine.output, theirs.output, close):
            return "other outputs"
        if not same(mine.inputs, theirs.inputs, close):
            return "other changes to its inputs"
        # The gradient of a bias before a batch norm is zero but for rounding.
        sizes = [float(g.abs().max()) for g in theirs.gradients.values() if g is not None and g.numel()]
        for what, ours, originals, floor in (
            ("attribute", mine.attributes, theirs.attributes, 0.0),
            ("buffer", mine.buffers, theirs.buffers, 0.0),
            ("gradient of", mine.gradients, theirs.gradients, 1e-6 * max(sizes, default=0.0)),
        ):
            for name in {**originals, **ours}:
                both = name in ours and name in originals
                if not both or not same(ours[name], originals[name], close, floor):
                    return f"another {what} {name.lstrip('.')}"
    return ""


def same(one: Any, other: Any, close: Close, floor: float = 0.0) -> bool:
    """Whether two values are, tensors compared by ``close``, everything else exactly."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return close(one, other, floor) if one.is_floating_point() else torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k], close, floor) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(lambda a, b: same(a, b, close, floor), one, other))
    if (hasattr(one, "__dict__") or is_dataclass(one)) and not callable(one):
        return same(contents(one), contents(other), close, floor)
    return one is other or bool(one == other) or bool(one != one and other != other)


def nearly_equal(one: Tensor, other: Tensor, floor: float) -> bool:
    """Up to rounding in the last places of the largest number: the operations are the same ones."""
    if torch.equal(one, other):
        return True
    one, other = one.double(), other.double()
    if not torch.equal(one.isfinite(), other.isfinite()):
        return False
    one, other = one.nan_to_num(0.0, 0.0, 0.0), other.nan_to_num(0.0, 0.0, 0.0)
    return bool((one - other).abs().max() <= 1e-5 * other.abs().max() + floor)
