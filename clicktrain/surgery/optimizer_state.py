"""What an optimizer keeps for parameters that change shape: it shrinks with them, in the same optimizer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def state_refusal(name: str, parameter: Tensor, optimizers: Sequence[Optimizer]) -> str | None:
    """Why what the optimizers keep for a parameter cannot shrink with it; None if it can."""
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        held = any(p is parameter for group in optimizer.param_groups for p in group["params"])
        if held and kind == "LBFGS":
            return "LBFGS keeps one state for all parameters together: use another optimizer"
        odd = unshrinkable_state(optimizer.state.get(parameter, {}), parameter)
        if odd:
            return (
                f"{kind} keeps {', '.join(odd)} for {name}, "
                "neither numbers nor one value for each weight: make the optimizer after surgery"
            )
    return None


def unshrinkable_state(state: Mapping[str, Any], parameter: Tensor) -> list[str]:
    """Names of the entries of a parameter's optimizer state that cannot shrink with it."""
    return [str(key) for key, value in state.items() if not _shrinks(value, parameter)]


def exchange_(
    optimizer: Optimizer,
    new: Mapping[Tensor, Tensor],
    removed: Collection[Tensor],
    shrink: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Put new parameters where the old ones are, with their state; take removed ones out.

    The groups, the order of the parameters and the order of the state stay.

    Args:
        optimizer: changed in place.
        new: old parameter -> new one.
        removed: parameters that are gone.
        shrink: (old parameter, tensor of its shape) -> what stays of it.
    """
    out = {id(parameter) for parameter in removed}
    for group in optimizer.param_groups:
        stays = [id(parameter) not in out for parameter in group["params"]]
        # In place: schedulers and wrappers may hold on to the list.
        group["params"][:] = [
            new.get(parameter, parameter)
            for parameter, kept in zip(group["params"], stays, strict=True)
            if kept
        ]
        if "param_names" in group:
            group["param_names"] = [n for n, kept in zip(group["param_names"], stays, strict=True) if kept]
    entries = list(optimizer.state.items())
    optimizer.state.clear()
    for key, state in entries:
        if id(key) in out:
            continue
        if isinstance(key, Tensor) and key in new:
            optimizer.state[new[key]] = {
                name: _shrunken(key, value, shrink) if _per_channel(value, key) else value
                for name, value in state.items()
            }
        else:
            optimizer.state[key] = state


def _shrunken(parameter: Tensor, value: Tensor, shrink: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """What stays of a value for each weight, or of factors whose sizes are the parameter's or 1."""
    if value.shape == parameter.shape:
        return shrink(parameter, value)
    result = shrink(parameter, value.expand(parameter.shape))
    for dim, size in enumerate(value.shape):
        if size != parameter.shape[dim]:
            result = result.narrow(dim, 0, 1)
    return result.contiguous()


def _per_channel(value: Any, parameter: Tensor) -> bool:
    """Whether a value has the parameter's sizes, or 1 in their place (the factors that Adafactor keeps)."""
    if not isinstance(value, Tensor) or value.dim() != parameter.dim() or value.numel() == 1:
        return isinstance(value, Tensor) and value.shape == parameter.shape
    return all(mine in (1, its) for mine, its in zip(value.shape, parameter.shape, strict=True))


def _shrinks(value: Any, parameter: Tensor) -> bool:
    """Whether it is known how an entry of a parameter's state shrinks."""
    if not isinstance(value, (Tensor, list, tuple, dict)) or _per_channel(value, parameter):
        return True
    return isinstance(value, Tensor) and value.numel() == 1
