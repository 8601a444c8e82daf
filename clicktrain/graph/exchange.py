"""The one exchange of a parameter: the module's, the gradient, hooks, and what optimizers keep for it.

Surgery and packing put another tensor in a parameter's place and say by a function how a tensor of the old
shape becomes one of the new shape. The optimizer object, its groups and their order stay.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def replace_module_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Hang a module into its parent at the place of another."""
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent).register_module(child, new)


def exchanged(parameter: Tensor, convert: Callable[[Tensor], Tensor]) -> nn.Parameter:
    """The parameter that takes the place of another, with its value and gradient converted to the new shape.

    Attributes move, and the hook tables themselves, so that handles go on working.
    """
    new = nn.Parameter(convert(parameter.detach()), requires_grad=parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    if parameter.grad is not None:
        new.grad = convert(parameter.grad.detach())
    for table in _PARAMETER_HOOKS:
        if getattr(parameter, table, None) is not None:
            setattr(new, table, getattr(parameter, table))
    return new


def exchange_(
    optimizers: Iterable[Optimizer],
    new: Mapping[Tensor, Tensor],
    convert: Callable[[Tensor, Tensor], Tensor],
    removed: Collection[Tensor] = (),
) -> None:
    """Put new parameters where optimizers hold the old ones, with their state; take removed ones out.

    Args:
        convert: (old parameter, tensor of its shape) -> tensor of the new shape.
    """
    out = {id(parameter) for parameter in removed}
    for optimizer in optimizers:
        _exchange_groups(optimizer, new, out)
        entries = list(optimizer.state.items())
        optimizer.state.clear()  # to be filled in the old order
        for key, state in entries:
            if id(key) in out:
                continue
            if isinstance(key, Tensor) and key in new:
                optimizer.state[new[key]] = {
                    name: _converted(key, value, convert) if _fits(value, key, factors=True) else value
                    for name, value in state.items()
                }
            else:
                optimizer.state[key] = state


def _exchange_groups(optimizer: Optimizer, new: Mapping[Tensor, Tensor], out: Collection[int]) -> None:
    for group in optimizer.param_groups:
        stays = [id(parameter) not in out for parameter in group["params"]]
        held = zip(group["params"], stays, strict=True)
        # In place: schedulers and wrappers may hold on to the list.
        group["params"][:] = [new.get(parameter, parameter) for parameter, kept in held if kept]
        if "param_names" in group:
            group["param_names"] = [n for n, kept in zip(group["param_names"], stays, strict=True) if kept]


def _converted(parameter: Tensor, value: Tensor, convert: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A value for each weight in the new shape, or factors whose sizes are the parameter's or 1."""
    if value.shape == parameter.shape:
        return convert(parameter, value)
    result = convert(parameter, value.expand(parameter.shape))
    for dim, size in enumerate(value.shape):
        if size != parameter.shape[dim]:
            result = result.narrow(dim, 0, 1)
    return result.contiguous()


def _fits(value: Any, parameter: Tensor, factors: bool) -> bool:
    """Whether a value has the parameter's sizes or, as a factor, 1 in their place (Adafactor keeps such)."""
    if not isinstance(value, Tensor):
        return False
    if not factors or value.dim() != parameter.dim() or value.numel() == 1:
        return value.shape == parameter.shape
    return all(mine in (1, its) for mine, its in zip(value.shape, parameter.shape, strict=True))


def odd_state(
    optimizer: Optimizer, state: Mapping[str, Any], parameter: Tensor, *, factors: bool
) -> list[str]:
    """Names of the entries of a parameter's optimizer state that cannot be exchanged with it.

    Args:
        factors: whether the new shape has the old one's dimensions (surgery), so that factors with size 1
            along some of them have a meaning; packed values have not.
    """
    if not factors and isinstance(optimizer, torch.optim.Adafactor):
        return [str(key) for key in state]  # for 1x1 kernels its row sums happen to have the weight's shape
    return [
        str(key)
        for key, value in state.items()
        if isinstance(value, (Tensor, list, tuple, dict))
        and not _fits(value, parameter, factors)
        and not (isinstance(value, Tensor) and value.numel() == 1)
    ]


def state_refusal(
    parameter: Tensor, optimizers: Iterable[Optimizer], hint: str, *, factors: bool
) -> str | None:
    """Why what the optimizers keep for a parameter cannot be exchanged with it; None if it can.

    Args:
        hint: what to do about a state that cannot be exchanged.
        factors: as in `odd_state`.
    """
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        held = any(p is parameter for group in optimizer.param_groups for p in group["params"])
        if held and kind == "LBFGS":
            return "LBFGS keeps one state for all parameters together: use another optimizer"
        odd = odd_state(optimizer, optimizer.state.get(parameter, {}), parameter, factors=factors)
        if odd:
            return f"{kind} keeps {', '.join(odd)}, neither numbers nor one value for each weight: {hint}"
    return None
