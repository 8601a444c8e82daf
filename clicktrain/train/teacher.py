"""Knowledge distillation (Hinton et al. 2015) into the pruned network, from its dense weights or a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.accounting import count
from clicktrain.errors import UserError, shown
from clicktrain.own_code import is_own
from clicktrain.runs.folder import RunFolder
from clicktrain.surgery import SurgeryPlan, apply_surgery_
from clicktrain.train.config import RunConfig
from clicktrain.train.prepare import build_model
from clicktrain.train.restore import load_run


class Teacher:
    """A network in evaluation mode that is not trained.

    Attributes:
        model: on the device of the run.
        forward_flops: of one image.
    """

    def __init__(self, model: nn.Module, facts: Mapping[str, Any], own_facts: Mapping[str, Any]) -> None:
        """Take a network; ``facts`` are what it was trained with, ``own_facts`` those of the run."""
        self.model = model.eval().requires_grad_(False)
        device = next(model.parameters()).device
        image = torch.zeros(1, *own_facts["image_shape"], device=device)
        self.forward_flops = count(model, image).forward_flops
        self._scale = self._shift = None
        if (facts["mean"], facts["std"]) != (own_facts["mean"], own_facts["std"]):
            mean, std, own_mean, own_std = (
                torch.tensor(values, device=device).view(1, -1, 1, 1)
                for values in (facts["mean"], facts["std"], own_facts["mean"], own_facts["std"])
            )
            self._scale, self._shift = own_std / std, (own_mean - mean) / std

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Outputs [B, K] for images [B, C, H, W] normalized as the run's are."""
        if self._scale is not None and self._shift is not None:
            x = x * self._scale + self._shift
        output: Tensor = self.model(x)
        return output.float()


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, mean over the images; logits [B, K]."""
    log_student, log_teacher = (F.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def own_teacher(
    facts: Mapping[str, Any],
    plans: Sequence[SurgeryPlan],
    weights: Mapping[str, Tensor],
    like: nn.Module,
    channels_last: bool,
) -> Teacher:
    """Make a teacher of the run's own network, from weights of it that are not packed.

    Args:
        facts: see `Prepared.facts`.
        plans: removals of channels that the weights have behind them.
        weights: a state dict.
        like: the network that is trained, for its device.
        channels_last: as the settings.
    """
    model = build_model(dict(facts))
    for plan in plans:
        apply_surgery_(plan, model)
    model.load_state_dict(weights)
    model = model.to(next(like.parameters()).device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Teacher(model, facts, facts)


def load_teacher(config: RunConfig, facts: Mapping[str, Any], device: torch.device) -> Teacher:
    """Load the network of the run that ``teacher`` names; UserError if it is for other images or classes."""
    assert config.teacher is not None
    name = RunFolder(Path(config.teacher)).read_settings().get("model")
    loaded = load_run(config.teacher, config.model if is_own(name) and is_own(config.model) else None)
    for key in ("image_shape", "classes", "value_range"):
        if loaded.facts.get(key) != facts[key]:
            raise UserError(
                f"teacher {config.teacher} was trained with {key} {shown(loaded.facts.get(key))}, this run "
                f"has {shown(facts[key])}: choose one of the same data"
            )
    return Teacher(loaded.model.to(device), loaded.facts, facts)
