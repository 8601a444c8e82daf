"""A cache of measured plans on disk: a network is measured once per machine, and then runs the same way.

Two measurements never agree to the last digit, and two plans may differ in the order of their sums. Keeping
the first plan makes a second run of the same settings equal to the first, bit for bit, and starts it sooner.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import fx, nn

from clicktrain.compiler.measure import problem_of
from clicktrain.compiler.norm_statistics import check_plan
from clicktrain.compiler.plan import Activations, LoweringPlan
from clicktrain.compiler.units import Unit, find_units, shape_of
from clicktrain.errors import UserError
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.formats.packed import Patterns
from clicktrain.graph import ModelGraph
from clicktrain.kernels.impls import candidates_for
from clicktrain.kernels.layouts import LAYOUTS
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.native.folder import cache_folder, mark_used
from clicktrain.kernels.sparse_conv2d import PackedConv2d
from clicktrain.kernels.sparse_conv2d.api import OPERATOR
from clicktrain.latency.machine import Machine

FORMAT_VERSION = 3
_MOST_BYTES = 64 << 20
KERNELS = 12
"""Version of the kernels: raise it when old measurements do not hold any more."""


def place(
    units: Sequence[Unit],
    trained: Collection[fx.Node],
    batch: int,
    dtypes: Sequence[str],
    device: torch.device | None = None,
) -> Path:
    """Where the plan of such a network is kept on this machine.

    The name is a hash of the units, their problems, the machine, the compiler and the implementations.
    """
    tools = toolchain()
    about = [
        [
            unit.name,
            unit.kind,
            str(unit.activation),
            unit.pooled,
            [list(shape_of(node)) for node in (*unit.inputs, unit.output)],
            [node in trained for node in unit.inputs],
            problem_of(unit).to_json() if unit.kind == "conv" else repr(unit.module),
            *_moving(unit),
        ]
        for unit in units
    ]
    machine = asdict(Machine.here(device))
    compiler = None if tools is None else tools.identity
    impls = [[impl.name, impl.layout] for impl in candidates_for(OPERATOR)]
    text = json.dumps([KERNELS, machine, compiler, impls, list(LAYOUTS), batch, list(dtypes), about])
    return cache_folder() / f"plan-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def read(path: Path) -> LoweringPlan | None:
    """Read a plan; None if there is none, or if the file was damaged, edited or copied from elsewhere.

    The file holds the name that it was written under and a hash of the plan.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            document = json.loads(file.read(_MOST_BYTES))
        text = document["plan"]
        if document["version"] != FORMAT_VERSION or document["name"] != path.name:
            return None
        if document["sha256"] != hashlib.sha256(text.encode()).hexdigest():
            return None
        plan = LoweringPlan.from_json(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    mark_used(path)
    return plan


def fits(
    plan: LoweringPlan,
    traced: ModelGraph,
    batch: int,
    possible: Collection[Activations],
    dtypes: Collection[str],
) -> bool:
    """Whether a plan could have been made for this network on this machine."""
    units, refused = find_units(traced)
    device = next(traced.model.parameters()).device
    if plan.rule != "measured" or plan.batch != batch or plan.machine != Machine.here(device):
        return False
    if plan.activations not in possible:
        return False
    known = [(unit.name, unit.kind, shape_of(unit.inputs[0])[1:], _weight(unit.module)) for unit in units]
    known += [(name, "conv", (), ()) for name in refused]
    if [(one.layer, one.kind, one.image, one.weight) for one in plan.choices] != known:
        return False
    if any(one.kind == "conv" and one.dense.split()[1] not in dtypes for one in plan.choices[: len(units)]):
        return False
    try:
        check_plan(traced, plan)
    except UserError:
        return False
    return True


def keep(path: Path, plan: LoweringPlan) -> None:
    """Write a plan; where that is impossible the next run measures again."""
    text = plan.to_json()
    digest = hashlib.sha256(text.encode()).hexdigest()
    document = {"version": FORMAT_VERSION, "name": path.name, "sha256": digest, "plan": text}
    try:
        write_text_atomic(path, json.dumps(document))
    except (OSError, UserError):  # UserError: the disk is full
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _moving(unit: Unit) -> list[Patterns]:
    """The patterns that a layer may have whose positions still move: it has other kernels than fixed ones."""
    layer = unit.module
    patterns = layer.structure.patterns if isinstance(layer, PackedConv2d) else None
    return [] if patterns is None else [patterns]


def _weight(layer: nn.Module | None) -> tuple[int, ...]:
    if isinstance(layer, PackedConv2d):
        return tuple(layer.structure.shape)
    return tuple(layer.weight.shape) if isinstance(layer, nn.Conv2d) else ()
