"""What was removed from a network: it keeps the plans itself, through copies and whoever holds it."""

from __future__ import annotations

from torch import nn

from clicktrain.surgery.plan import SurgeryPlan

_NAME = "_clicktrain_plans"


def plans_of(model: nn.Module) -> tuple[SurgeryPlan, ...]:
    """The plans that were carried out on a network, or on what it was copied from, in order."""
    plans: tuple[SurgeryPlan, ...] = model.__dict__.get(_NAME, ())
    return plans


def note_plan_(model: nn.Module, plan: SurgeryPlan) -> None:
    """Add a plan that was carried out."""
    model.__dict__[_NAME] = (*plans_of(model), plan)
