"""Guards: what a user's own function of an axis may return. Anything else is a `UserError` of one sentence.

An axis says in words what it wants and, in a function, what is wrong with a value that came back; `guard_of`
makes the wrapper that `clicktrain.sparsity.registry.Registry` puts around a user's own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from clicktrain.errors import UserError, shortened, shown
from clicktrain.own_code import place_of

Problem = Callable[..., "str | None"]
"""(what came back, *arguments) -> what is wrong with it, or None."""


def guard_of(
    what: str, wanted: str, problem: Problem, keeps: Sequence[int] = ()
) -> Callable[[str, Any], Any]:
    """A guard of functions: (name, function) -> the function, with a `UserError` where it fails.

    Args:
        what: a choice of the axis, in a sentence.
        wanted: the signature, in words.
        problem: what is wrong with a value.
        keeps: tensors among the arguments that must not be changed in place. The first call gets copies.
    """

    def guard(name: str, function: Any) -> Any:
        copies = keeps

        @functools.wraps(function)
        def checked(*given: Any) -> Any:
            nonlocal copies
            args = [x.clone() if i in copies else x for i, x in enumerate(given)]
            try:
                value = function(*args)
            except UserError:
                raise
            except Exception as error:
                inside = (
                    error.__traceback__ and error.__traceback__.tb_next
                )  # not a call with wrong arguments
                text = (
                    f"{type(error).__name__}: {shortened(str(error), 160)}{place_of(error) if inside else ''}"
                )
                raise UserError(f"{what} {name!r} failed with {text}: a {what} is {wanted}") from error
            if any(not torch.allclose(args[i], given[i], 0, 0, equal_nan=True) for i in copies):
                raise UserError(
                    f"{what} {name!r} changed a tensor that it was given in place: a {what} is {wanted}"
                )
            if (wrong := problem(value, *given)) is not None:
                raise UserError(f"{what} {name!r} {wrong}: a {what} is {wanted}")
            copies = ()
            return value

        return checked

    return guard


def returned(value: object) -> str:
    """What came back, in words."""
    if isinstance(value, Tensor):
        return f"returned {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"returned {shown(value)}"


def share_problem(value: object) -> str | None:
    """What is wrong with a value that is to be a number in [0, 1]."""
    if isinstance(value, Real) and 0 <= float(value) <= 1:
        return None
    return returned(value)


def keys_problem(value: object, names: Mapping[str, Any]) -> str | None:
    """What is wrong with a value that is to be a mapping of exactly these names."""
    if not isinstance(value, Mapping):
        return returned(value)
    odd = [name for name in (*names, *value) if name not in value or name not in names]
    return f"returned {'no' if odd[0] in names else 'an unknown'} layer {shown(odd[0])}" if odd else None


def mask_problem(value: Any, wanted: Mapping[str, Tensor]) -> str | None:
    """What is wrong with a value that is to be one mask per layer, of these shapes."""
    if (wrong := keys_problem(value, wanted)) is not None:
        return wrong
    for name, like in wanted.items():
        mask = value[name]
        if not isinstance(mask, Tensor) or (mask.dtype, mask.shape) != (torch.bool, like.shape):
            return f"{returned(mask)} for {name}, not bool {list(like.shape)}"
        if mask.device != like.device:
            return f"returned a mask on {mask.device} for {name}, not on {like.device}"
    return None


def score_problem(values: object, shape: Sequence[int], lowest: float = -math.inf) -> str | None:
    """What is wrong with a value that is to be finite floating-point numbers of a shape.

    Looking at values waits for the device: a user's own function alone pays for it.
    """
    if not isinstance(values, Tensor) or values.shape != torch.Size(shape) or not values.is_floating_point():
        return f"{returned(values)}, not floating-point {list(shape)}"
    low, high = (float(end) for end in values.detach().aminmax())
    if math.isnan(low) or math.isnan(high):
        return "gave NaN scores"
    if math.isinf(low) or math.isinf(high):
        return "gave infinite scores"
    return "gave negative scores" if low < lowest else None
