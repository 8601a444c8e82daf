"""Steps that are given a closure, by which the optimizer itself has loss and gradients computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clicktrain.errors import UserError


class StepClosure:
    """Stands for the closure of one step, and says when gradients are there.

    Args:
        closure: of the loop: computes the loss and its gradients, and usually returns the loss.
        after: called after each call of the closure, with what it returned and whether it is the first call
            in this step.
        failed: called when the closure, or ``after``, raises.
    """

    def __init__(
        self, closure: Callable[[], Any], after: Callable[[Any, bool], None], failed: Callable[[], None]
    ) -> None:
        self._closure, self._after, self._failed = closure, after, failed
        self.calls = 0
        self.running = False

    def __call__(self) -> Any:
        """Call the closure, then the pruner; what the closure returns."""
        self.running = True
        try:
            loss = self._closure()
            self.calls += 1
            self._after(loss, self.calls == 1)
        except BaseException:
            self._failed()
            raise
        finally:
            self.running = False
        return loss

    def check_called(self, optimizer: object) -> None:
        """Raise a UserError after a step that has not called it: nothing knows what was stepped by."""
        if not self.calls:
            raise UserError(
                f"{type(optimizer).__name__}.step was given a closure and has not called it: call backward() "
                "and observe(loss) first, then optimizer.step() without a closure"
            )


def closure_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """The closure among the arguments of a step (the optimizer is the first of them), if there is one."""
    given = kwargs.get("closure")
    return given if given is not None else next((value for value in args[1:] if callable(value)), None)


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[[], Any], other: Callable[[], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with ``other`` in place of ``closure``."""
    positional = tuple(other if value is closure else value for value in args)
    return positional, {name: other if value is closure else value for name, value in kwargs.items()}


def as_loss(returned: Any) -> Tensor:
    """What a closure returned, for `Pruner.observe`: a number becomes a 0-dim tensor."""
    if isinstance(returned, Tensor):
        return returned
    if isinstance(returned, (int, float)) and not isinstance(returned, bool):
        return torch.tensor(float(returned))
    raise UserError(
        f"the closure given to the optimizer's step returned a {type(returned).__name__}: return the loss, "
        "or call pruner.observe(loss) inside the closure"
    )
