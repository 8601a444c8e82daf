"""Calling a registered operator without PyTorch's dispatcher, where nobody would notice.

An operator of ``torch.library.custom_op`` costs 50 microseconds a call and 150 with gradients, whatever it
does: in a narrow network that is a fifth of a training step. Registered operators are for those who look at
graphs: ``torch.compile``, ``torch.export``, tracing, dispatch modes, function transforms. Everybody else gets
the same functions through `torch.autograd.Function`, which costs a third.
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
_KNOWN = frozenset((Tensor, torch.nn.Parameter, list, str, int, type(None)))


def unwatched(*arguments: object) -> bool:
    """Whether only plain tensors are there, and nothing that wants to see operators."""
    if (
        torch.compiler.is_compiling()
        or _is_tracing()
        or _len_torch_dispatch_stack()
        or _are_functorch_transforms_active()
    ):
        return False
    # Asking what is no tensor costs more, so it comes last.
    return all(type(one) in _KNOWN or not isinstance(one, Tensor) for one in arguments)


def _alive(function: Callable[..., R], arguments: tuple[Any, ...]) -> R:
    """Call a function; tensors that have outlived a function transform stand for those inside them."""
    try:
        return function(*arguments)
    except RuntimeError:  # such tensors have no memory
        inside = unwrap_dead_wrappers(arguments)
        if all(a is b for a, b in zip(arguments, inside, strict=True)):
            raise
        return function(*inside)


def plain(operator: Callable[..., R], run: Callable[..., R]) -> Callable[..., R]:
    """An operator without a gradient: ``run`` itself where nobody watches.

    Args:
        operator: as registered.
        run: what it does, with the same arguments.
    """

    @functools.wraps(run)
    def call(*arguments: Any) -> R:
        return _alive(run, arguments) if unwatched(*arguments) else operator(*arguments)

    return call


class _Once(torch.autograd.Function):
    """Gradients as they are, which cannot be differentiated themselves."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The first ``count`` tensors; the others are what they depend on."""
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        """There are no kernels for it."""
        raise UserError(
            "sparse kernels have no second derivatives: compute those (create_graph=True) with the network "
            "that clicktrain.unpack(model) gives"
        )


def _only_once(
    ctx: Any, gradients: tuple[Any, ...], found: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients that refuse to be differentiated, by whatever they depend on."""
    given = [one for one in found if one is not None]
    saved = [t for t in (*ctx.saved_tensors, *gradients) if isinstance(t, Tensor) and t.requires_grad]
    marked = iter(_Once.apply(len(given), *given, *saved))  # type: ignore[no-untyped-call]
    return tuple(None if one is None else next(marked) for one in found)


def differentiable(
    operator: Callable[..., R],
    run: Callable[..., R],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., Any],
) -> Callable[..., R]:
    """An operator with a gradient.

    Args:
        operator: as registered, with its gradient.
        run: what it does, with the same arguments.
        save: (context, inputs, output), as ``register_autograd`` has it; tensors that never have a gradient
            may stay with the context as they are, which costs less.
        backward: (context, gradients of the outputs) -> one gradient for each argument.
    """

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            output = run(*arguments)
            save(ctx, arguments, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            again = torch.is_grad_enabled()  # the graph of the gradient was asked for
            with torch.no_grad():
                found = backward(ctx, *gradients)
            found = found if isinstance(found, tuple) else (found,)
            # Lists of tensors have lists of gradients there, and count as no tensor here.
            found = tuple(None if isinstance(one, list) else one for one in found)
            return _only_once(ctx, gradients, found) if again else found

    # `torch.autograd.Function.apply` without its Python: there are no function transforms to look for, and
    # `_alive` looks after what they leave behind.
    record: Callable[..., R] = super(torch.autograd.Function, Direct).apply

    @functools.wraps(run)
    def call(*arguments: Any) -> R:
        if not unwatched(*arguments):
            return operator(*arguments)
        return _alive(record if torch.is_grad_enabled() else run, arguments)

    return call
