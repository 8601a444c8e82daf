"""Stage 5 on fast operators, chosen by the compiler and kept in the run's folder (ClickTrain 5.4)."""

from __future__ import annotations

import time
import warnings

import torch
from torch import nn

from clicktrain.compiler import Accelerated, LoweringPlan, accelerate
from clicktrain.files import is_file
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.runs.events import OperatorsEvent
from clicktrain.runs.folder import RunFolder
from clicktrain.train.prepare import Prepared
from clicktrain.train.progress import Progress

SHORT_FLOPS = 2e12
"""Dense training FLOPs (a minute of one core) under which measuring costs more than it can save."""


def can_accelerate(p: Prepared) -> bool:
    """Whether the settings and the device ask for fast operators after the hard prune."""
    return p.config.packed and p.config.operators != "reference" and p.device.type == "cpu"


def choose_operators(
    p: Prepared, folder: RunFolder, progress: Progress, epoch: int
) -> tuple[nn.Module, OperatorsEvent | None]:
    """Compile the packed model, by the plan in the run's folder if there is one.

    The plan is written before the first step that uses it, so that a resumed run uses the same operators, bit
    for bit.

    A run with little left to compute after ``epoch`` finished epochs takes the paper's rule and measures
    nothing. ``progress`` is sent the reasons why layers stay as they are.

    Returns:
        The accelerated view of the packed model, and what was chosen; the model itself and None where that
        is impossible.
    """
    started = time.perf_counter()
    plan = LoweringPlan.read(folder.operators) if is_file(folder.operators) else None
    rule = p.config.operators
    images_left = len(p.train_loader) * p.batch_size * (p.config.epochs - epoch)
    if rule == "measured" and images_left * p.cost.dense < SHORT_FLOPS:
        rule = "density"
    example = torch.zeros(p.batch_size, *p.data.image_shape)
    dtypes = ("fp32", "bf16") if p.config.precision == "bf16" else ("fp32",)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = accelerate(p.model, example, rule=rule, plan=plan, dtypes=dtypes)
    for warning in caught:
        progress.message(str(warning.message))
    if not isinstance(model, Accelerated):
        return model, None
    if plan is None:
        write_text_atomic(folder.operators, model.plan.to_json())
    layers = {row["layer"]: row["operator"] for row in model.plan.table()}
    blocked = sum(operator.endswith("blocked") for operator in layers.values())
    kept = ", activations kept in bf16" if model.plan.activations == "bf16" else ""
    progress.message(
        f"{blocked} of {len(layers)} convolutions run in the blocked layout from here on{kept} "
        f"(chosen in {time.perf_counter() - started:.1f} s)"
    )
    return model, OperatorsEvent(rule=model.plan.rule, activations=model.plan.activations, layers=layers)


def operator_names(folder: RunFolder) -> dict[str, str]:
    """Layer -> operator of stage 5, as far as a compiler chose one."""
    rows = LoweringPlan.read(folder.operators).table() if is_file(folder.operators) else ()
    return {row["layer"]: row["operator"] for row in rows}
