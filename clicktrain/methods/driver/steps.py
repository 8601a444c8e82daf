"""Steps of the attached optimizers, as their hooks see them: with a closure, or without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from clicktrain.errors import UserError
from clicktrain.methods.driver.optimizers import OptimizerUnit


class StepHooks:
    """The hooks of all attached optimizers.

    An optimizer whose step calls its parent's, or that of an optimizer it wraps, runs the hooks of both: only
    the outermost count.

    Args:
        unit_of: the unit of each optimizer, by its id.
        before: called when gradients are there, and the weights of a unit are about to change.
        after: called when they have changed.
        after_closure: called when a closure has computed gradients, before ``before``, with what it returned.
        after_closure_again: called when it has done so another time in one step, because the optimizer looks
            at the loss elsewhere (SAM, a line search).

    Attributes:
        begun: how deep each unit is in a step, by its id; empty between steps.
    """

    def __init__(
        self,
        unit_of: Mapping[int, OptimizerUnit],
        before: Callable[[Optimizer, OptimizerUnit], None],
        after: Callable[[Optimizer, OptimizerUnit], None],
        after_closure: Callable[[OptimizerUnit, Any], None],
        after_closure_again: Callable[[], None],
    ) -> None:
        self._unit_of, self._before, self._after = unit_of, before, after
        self._after_closure, self._after_closure_again = after_closure, after_closure_again
        self.begun: dict[int, int] = {}
        self._closures: dict[int, StepClosure] = {}

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """``register_step_pre_hook``: other arguments for the step if it has a closure."""
        unit = self._unit_of[id(optimizer)]
        depth = self.begun[id(unit)] = self.begun.get(id(unit), 0) + 1
        if depth > 1:
            return None
        closure = closure_in(args, kwargs) if kwargs or len(args) > 1 else None
        if closure is None:
            self._before(optimizer, unit)
            return None

        def after(returned: Any, first: bool) -> None:
            if first:
                self._after_closure(unit, returned)
                self._before(optimizer, unit)
            else:
                self._after_closure_again()

        observed = self._closures[id(unit)] = StepClosure(closure, after, self._forget)
        return with_closure(args, kwargs, closure, observed)

    def after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """``register_step_post_hook``."""
        unit = self._unit_of[id(optimizer)]
        depth = self.begun.pop(id(unit), 1) - 1
        if depth > 0:
            self.begun[id(unit)] = depth
            return
        if (closure := self._closures.pop(id(unit), None)) is not None:
            closure.check_called(optimizer)
        self._after(optimizer, unit)

    def forget_begun(self) -> None:
        """Forget steps that have begun and never ended, as one that raised, unless a closure runs now."""
        if not any(closure.running for closure in self._closures.values()):
            self._forget()

    def _forget(self) -> None:
        self.begun.clear()
        self._closures.clear()


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
