"""When a plan of operators is worth making, and when it has to be made again."""

from __future__ import annotations

import math

from torch import nn

from clicktrain.compiler.plan import LoweringPlan
from clicktrain.kernels.sparse_conv2d import PackedConv2d

SHORT_FLOPS = 2e12
"""Dense training FLOPs (a minute of one core) under which measuring costs more than it can save."""
SAME_DENSITY = 0.2
"""A plan serves other masks if the number of weights has changed by no larger share since it was made."""


def still_fits(plan: LoweringPlan, model: nn.Module) -> bool:
    """Whether a packed model has about as many weights in its convolutions as when the plan was made."""
    convs = [(one.density, math.prod(one.weight), one.layer) for one in plan.choices if one.kind == "conv"]
    modules = dict(model.named_modules())
    then = now = 0.0
    for density, weights, name in convs:
        layer = modules.get(name.partition("#")[0])
        if isinstance(layer, PackedConv2d):
            then += density * weights
            now += layer.structure.nnz
    return abs(now - then) <= SAME_DENSITY * then
