"""How gradients come back through a packed convolution, the same in every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Gradients(NamedTuple):
    """What `torch.library.register_autograd` and `clicktrain.kernels.direct.differentiable` want.

    Arguments of the operator are (x, values, bias, tables, plan, ...); its outputs behind the first one have
    no gradients.
    """

    save: Callable[..., None]
    """With all tensors saved by autograd, as a registered operator has to."""
    save_directly: Callable[..., None]
    """With tables kept as they are."""
    backward: Callable[..., tuple[Any, ...]]


def gradients(
    dgrad: Callable[[Tensor, Tensor, list[Tensor], str], Tensor],
    wgrad: Callable[[Tensor, Tensor, list[int], list[Tensor], str], Tensor],
    but_filters: tuple[int, ...],
) -> Gradients:
    """Compose them from the operators of a layout; ``but_filters``: an output's dimensions except filters."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        save_directly(ctx, inputs, output)
        ctx.tables = None
        ctx.save_for_backward(*inputs[:2], *inputs[3])

    def save_directly(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, values, _, ctx.tables, ctx.plan, *more = inputs
        ctx.more = [None] * len(more)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, values)

    def backward(ctx: Any, gy: Tensor, *_: Any) -> tuple[Any, ...]:
        x, values, *saved = ctx.saved_tensors
        tables, unused = (saved, [None] * len(saved)) if ctx.tables is None else (ctx.tables, None)
        need_x, need_values, need_bias = ctx.needs_input_grad[:3]
        gx = dgrad(gy, values, tables, ctx.plan) if need_x else None
        gv = None
        if need_values:
            gv = wgrad(x, gy, list(values.shape), tables, ctx.plan).to(values.dtype)
        gb = gy.sum(but_filters, dtype=values.dtype) if need_bias else None
        return gx, gv, gb, unused, None, *ctx.more

    return Gradients(save, save_directly, backward)
