"""What was removed from a network: it keeps the plans itself, through copies and whoever holds it.

As text, so that a pickled network needs nothing of this package to be loaded.
"""

from __future__ import annotations

import json

from torch import nn

from clicktrain.surgery.plan import SurgeryPlan

_NAME = "_clicktrain_plans"


def plans_of(model: nn.Module) -> tuple[SurgeryPlan, ...]:
    """The plans that were carried out on a network, or on what it was copied from, in order."""
    return tuple(SurgeryPlan.from_json(json.loads(text)) for text in model.__dict__.get(_NAME, ()))


def note_plan_(model: nn.Module, plan: SurgeryPlan) -> None:
    """Add a plan that was carried out."""
    model.__dict__[_NAME] = (*model.__dict__.get(_NAME, ()), json.dumps(plan.to_json()))
