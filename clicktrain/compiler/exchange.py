"""What several processes exchange of each parameter's gradient, as a part of the plan (ClickTrain 5.4).

The paper's compiler turns every all-reduce of stage 5 into one of kept positions. Here a packed parameter is
small by itself, and a hook (`clicktrain.comm.masked_allreduce_hook`) does it for masked dense ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from clicktrain.compiler import plan_fields as check
from clicktrain.errors import UserError
from clicktrain.kernels.sparse_conv2d import PackedLayer

HOWS = ("all", "kept values", "kept positions")
"""The whole gradient; that of packed values; what a hook gathers from that of a masked dense weight."""


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What travels of one parameter's gradient in a step that uses no gradients of pruned weights.

    Attributes:
        parameter: its name; a packed one ends in ``values``.
        weights: of the dense parameter.
        sent: numbers that travel.
        how: one of `HOWS`.
    """

    parameter: str
    weights: int
    sent: int
    how: str = HOWS[0]

    def __post_init__(self) -> None:
        if self.how not in HOWS:
            hows = ", ".join(HOWS)
            raise UserError(f"what travels of {self.parameter} is one of {hows}, not {self.how!r}")


def exchanged_gradients(
    model: nn.Module, masks: Mapping[Tensor, Tensor] = MappingProxyType({})
) -> tuple[Exchanged, ...]:
    """List the trained parameters, in the network's order, each once.

    ``masks``: of masked dense ones, parameter -> bool of its shape, as `Pruner.exchanged_masks` has them.
    """
    packed = {id(one.values): one.structure for one in model.modules() if isinstance(one, PackedLayer)}
    rows = []
    for name, parameter in model.named_parameters():
        weights = sent = parameter.numel()
        how = HOWS[0]
        if id(parameter) in packed:
            weights, how = math.prod(packed[id(parameter)].shape), HOWS[1]
        elif parameter in masks:
            sent, how = int(masks[parameter].sum()), HOWS[2]
        if parameter.requires_grad:
            rows.append(Exchanged(name, weights, sent, how))
    return tuple(rows)


def exchanged_from(entries: Any) -> tuple[Exchanged, ...]:
    """Read the rows of a saved plan; ValueError where they are none."""
    rows = []
    for entry in check.entries(entries, "exchange"):
        one = check.fields(entry, "an exchanged gradient")
        name = check.text(one["parameter"], "parameter")
        weights, sent = check.whole(one["weights"], f"weights of {name}"), check.whole(one["sent"], "sent")
        rows.append(Exchanged(name, weights, sent, check.text(one.get("how", HOWS[0]), "how")))
    return tuple(rows)


def exchanged_line(rows: tuple[Exchanged, ...]) -> str:
    """One sentence on all of them."""
    weights, sent = sum(row.weights for row in rows), sum(row.sent for row in rows)
    pruned = sum(row.how != HOWS[0] for row in rows)
    return (
        f"several processes exchange the gradients of {sent:,} of {weights:,} weights "
        f"({100 * sent / max(weights, 1):.1f}%): of {pruned} pruned parameters those that are kept"
    )
