"""Call a registered operator without PyTorch's dispatcher where nothing observes operators.

An operator of ``torch.library.custom_op`` costs 50 microseconds a call and 150 with gradients, whatever it
does: in a narrow network that is a fifth of a training step. ``torch.compile``, ``torch.export``, tracing,
dispatch modes and function transforms see the registered operators; everything else runs the same functions
through `torch.autograd.Function`, which costs a third.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _is_tracing, _len_torch_dispatch_stack
from torch._functorch.utils import unwrap_dead_wrappers

from clicktrain.errors import UserError

R = TypeVar("R")
_PLAIN = frozenset((Tensor, torch.nn.Parameter, list, tuple, torch.Size, str, int, float, bool, type(None)))
"""Types of arguments that PyTorch has no override for; ``map`` compares them in C."""


def _overridden(arguments: tuple[Any, ...]) -> bool:
    return any(type(one) not in _PLAIN and isinstance(one, Tensor) for one in arguments)


def _on_inner_tensors(function: Callable[..., R], arguments: tuple[Any, ...]) -> R:
    """Call again with the tensors inside those that outlived a function transform; else raise as before."""
    inside = unwrap_dead_wrappers(arguments)
    if all(a is b for a, b in zip(arguments, inside, strict=True)):
        raise
    return function(*inside)


def plain(
    operator: Callable[..., R], run: Callable[..., R], record: Callable[..., R] | None = None
) -> Callable[..., R]:
    """Wrap an operator: where nobody watches, ``run``, or ``record`` while gradients are recorded.

    One function, because it stands before every kernel of a training step: each Python call there costs as
    much as a small kernel.
    """

    @functools.wraps(run)
    def call(*arguments: Any) -> R:
        if (
            torch.compiler.is_compiling()
            or _is_tracing()
            or _len_torch_dispatch_stack()
            or _are_functorch_transforms_active()
            or (not _PLAIN.issuperset(map(type, arguments)) and _overridden(arguments))
        ):
            return operator(*arguments)
        function = run if record is None or not torch.is_grad_enabled() else record
        try:
            return function(*arguments)
        except RuntimeError:  # such tensors have no memory
            return _on_inner_tensors(function, arguments)

    return call


class _Once(torch.autograd.Function):
    """Gradients as they are, which cannot be differentiated themselves."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise UserError(
            "sparse kernels have no second derivatives: compute those (create_graph=True) with the network "
            "that clicktrain.unpack(model) gives"
        )


def _only_once(
    ctx: Any, gradients: tuple[Any, ...], result: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Mark gradients so that differentiating them again raises an error."""
    given = [one for one in result if one is not None]
    saved = [t for t in (*ctx.saved_tensors, *gradients) if isinstance(t, Tensor) and t.requires_grad]
    marked = iter(_Once.apply(len(given), *given, *saved))  # type: ignore[no-untyped-call]
    return tuple(None if one is None else next(marked) for one in result)


def differentiable(
    operator: Callable[..., R],
    run: Callable[..., R],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> Callable[..., R]:
    """Wrap an operator with a gradient.

    Args:
        operator: as registered, with its gradient.
        run: what it computes, with the same arguments.
        save: (context, inputs, output), as ``register_autograd`` has it; tensors that never have a gradient
            may stay with the context as they are, which costs less.
        backward: (context, gradients of the outputs) -> one gradient for each argument, None for lists.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = run(*arguments)
            save(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *gradients)
            with torch.no_grad():  # the graph of the gradient was asked for
                result = backward(ctx, *gradients)
            return _only_once(ctx, gradients, result if isinstance(result, tuple) else (result,))

    # `torch.autograd.Function.apply` without its Python: there are no function transforms to look for, and
    # `_on_inner_tensors` looks after what they leave behind.
    return plain(operator, run, super(torch.autograd.Function, Direct).apply)
