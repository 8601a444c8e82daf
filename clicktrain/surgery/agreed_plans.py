"""Plans that several processes carry out alike."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from clicktrain.comm.agreement import agreed_text, several_processes
from clicktrain.surgery import SurgeryPlan


def agreed_plans(plans: Mapping[int, SurgeryPlan], device: torch.device) -> dict[int, SurgeryPlan]:
    """The first process's plans, under their keys: others may have other statistics in their batch norms."""
    if not several_processes():
        return dict(plans)
    text = json.dumps([[key, plan.to_json()] for key, plan in plans.items()])
    return {key: SurgeryPlan.from_json(plan) for key, plan in json.loads(agreed_text(text, device))}
