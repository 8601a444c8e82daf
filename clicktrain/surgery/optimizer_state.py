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
        state = optimizer.state.get(parameter, {})
        # By name: row sums of a weight may happen to have its shape.
        foreign = (
            list(state) if kind == "Adafactor" else [k for k, v in state.items() if _foreign(v, parameter)]
        )
        if foreign:
            return (
                f"{kind} keeps {', '.join(map(str, foreign))} for {name}, "
                "neither numbers nor one value for each weight: make the optimizer after surgery"
            )
    return None


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
                name: shrink(key, value) if _per_weight(value, key) else value
                for name, value in state.items()
            }
        else:
            optimizer.state[key] = state


def _per_weight(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _foreign(value: Any, parameter: Tensor) -> bool:
    """Whether it is not known how an entry of a parameter's state shrinks."""
    if not isinstance(value, (Tensor, list, tuple, dict)) or _per_weight(value, parameter):
        return False
    return not (isinstance(value, Tensor) and value.numel() == 1)
