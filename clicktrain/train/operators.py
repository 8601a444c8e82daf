"""Packed networks on fast operators, chosen by the compiler and kept in the run's folder (ClickTrain 5.4)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from clicktrain.comm.agreement import gathered, of_first
from clicktrain.compiler import Accelerated, LoweringPlan, accelerate, dtypes_worth_measuring
from clicktrain.compiler.exchange import Exchanged, exchanged_gradients
from clicktrain.compiler.renewal import SHORT_FLOPS, still_fits
from clicktrain.files import is_file
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.kernels.impls import candidates_for
from clicktrain.kernels.sparse_conv2d.api import OPERATOR
from clicktrain.runs.events import OperatorsEvent
from clicktrain.runs.folder import RunFolder
from clicktrain.train.prepare import Prepared
from clicktrain.train.progress import Progress


def can_accelerate(p: Prepared) -> bool:
    """Whether the settings and the device ask for fast operators where layers are packed."""
    wanted = p.config.packed and p.config.operators != "reference"
    return wanted and bool(candidates_for(OPERATOR, p.device.type))


def choose_operators(
    p: Prepared, folder: RunFolder, progress: Progress, epoch: int, before: Accelerated | None = None
) -> tuple[nn.Module, OperatorsEvent | None]:
    """Compile the packed model, by the plan in the run's folder if there is one.

    The plan is written before the first step that uses it, so that a resumed run uses the same operators, bit
    for bit. There is one for masks that move, and one for frozen masks: the same, unless many weights have
    left since it was made (a gradual method).

    A run with little left to compute after ``epoch`` finished epochs takes the paper's rule and measures
    nothing. ``progress`` is sent the reasons why layers stay as they are. ``before`` is the view that has run
    while masks moved.

    Returns:
        The accelerated view of the packed model, and what was chosen, None if that is what has run before;
        the model itself and None where that is impossible in the first process. Where it is in another one
        alone, that one's view calls the model as it is.
    """
    started = time.perf_counter()
    path = folder.operators if p.pruner.frozen else folder.moving_operators
    plan = of_first(lambda: _known_plan(p, folder, path))
    stays = (
        before is not None and plan is not None and _without_exchange(plan) == _without_exchange(before.plan)
    )
    if of_first(lambda: stays) and before is not None:
        before.plan = replace(before.plan, exchange=_exchange(p))
        return before, None
    rule = p.config.operators
    images_left = len(p.train_loader) * p.batch_size * (p.config.epochs - epoch)
    if rule == "measured" and images_left * p.cost.dense < SHORT_FLOPS:
        rule = "density"
    example = torch.zeros(p.own_batch_size, *p.data.image_shape, device=p.device)
    dtypes = dtypes_worth_measuring(p.config.precision == "bf16")

    notes: list[str] = []

    def compiled(plan: LoweringPlan | None) -> Accelerated:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = accelerate(p.model, example, rule=rule, plan=plan, dtypes=dtypes)
        notes.extend(str(warning.message) for warning in caught)
        return model

    model = compiled(plan) if p.processes.first else None
    # What the first process measures, while the others wait, is what all of them run.
    made = of_first(lambda: model.plan.to_json() if model is not None and model.active else None)
    if made is not None and model is None:
        model = compiled(LoweringPlan.from_json(made))
    _say(gathered(notes, patiently=True), progress)
    if model is None or made is None:
        return p.model, None
    # Where this process alone has no kernels, the view calls the model as it is: all make the same choices.
    model.plan = replace(model.plan, exchange=_exchange(p))
    if plan is None:
        write_text_atomic(path, model.plan.to_json())
    layers = model.plan.operators()
    moved = {choice.layout for choice in model.plan.choices if choice.kind == "conv"} - {"plain"}
    count = sum(choice.kind == "conv" and choice.layout != "plain" for choice in model.plan.choices)
    kept = ", activations kept in bf16" if model.plan.activations == "bf16" else ""
    layout = " and ".join(sorted(one.replace("_", "-") for one in moved)) or "blocked"
    progress.message(
        f"{count} of {len(layers)} convolutions run in the {layout} layout from here on{kept} "
        f"(chosen in {time.perf_counter() - started:.1f} s)"
    )
    return model, OperatorsEvent(rule=model.plan.rule, activations=model.plan.activations, layers=layers)


def _say(notes: Sequence[Sequence[str]], progress: Progress) -> None:
    """Send why layers stay as they are: of the first process, and of others what it has not met itself."""
    first, *others = notes
    for note in first:
        progress.message(note)
    for rank, own in enumerate(others, start=1):
        for note in own:
            if note not in first:
                progress.message(f"process {rank}: {note}")


def _exchange(p: Prepared) -> tuple[Exchanged, ...]:
    return exchanged_gradients(p.model, p.pruner.network.exchanged_masks().masks)


def _without_exchange(plan: LoweringPlan) -> str:
    return replace(plan, exchange=()).to_json()


def _known_plan(p: Prepared, folder: RunFolder, path: Path) -> LoweringPlan | None:
    """The plan in the run's folder, written under the name of final masks if that of moving ones serves."""
    if is_file(path):
        return LoweringPlan.read(path)
    if not p.pruner.frozen or not is_file(folder.moving_operators):
        return None
    plan = LoweringPlan.read(folder.moving_operators)
    if not still_fits(plan, p.model):
        return None
    write_text_atomic(path, replace(plan, exchange=_exchange(p)).to_json())
    return plan


def operator_names(folder: RunFolder) -> dict[str, str]:
    """Layer -> operator of final masks, else of moving ones, as far as a compiler chose one."""
    paths = (path for path in (folder.operators, folder.moving_operators) if is_file(path))
    path = next(paths, None)
    return {} if path is None else LoweringPlan.read(path).operators()
