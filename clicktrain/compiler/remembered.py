"""Measured plans, kept on disk: a network is measured once per machine, and then always runs the same way.

Two measurements never agree to the last digit, and two plans may differ in the order of their sums. Keeping
the first plan makes a second run of the same settings equal to the first, bit for bit, and starts it sooner.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from torch import fx

from clicktrain.compiler.plan import LoweringPlan, Machine
from clicktrain.compiler.units import Unit, shape_of
from clicktrain.errors import UserError
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.kernels.native import toolchain
from clicktrain.kernels.native.library import cache_folder
from clicktrain.kernels.sparse_conv2d import PackedConv2d
from clicktrain.kernels.sparse_conv2d.blocked.vocabulary import MAX_SETS, distinct

KERNELS = 10
"""To be raised when kernels change so that old measurements say nothing any more."""


def place(units: Sequence[Unit], trained: Collection[fx.Node], batch: int, dtypes: Sequence[str]) -> Path:
    """Where the plan of such a network is kept on this machine.

    Networks are alike if they have the same layers with the same shapes and, to a hundredth, densities, and
    as many different tap sets.
    """
    tools = toolchain()
    about = [
        [
            unit.name,
            unit.kind,
            unit.relu,
            [list(shape_of(node)) for node in (*unit.inputs, unit.output)],
            [node in trained for node in unit.inputs],
            repr(unit.module) if not isinstance(unit.module, PackedConv2d) else _packed(unit.module),
        ]
        for unit in units
    ]
    machine = asdict(Machine.here())
    compiler = None if tools is None else tools.identity
    text = json.dumps([KERNELS, machine, compiler, batch, list(dtypes), about])
    return cache_folder() / f"plan-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def read(path: Path) -> LoweringPlan | None:
    """The plan that is kept there, None if there is none that can be read."""
    try:
        return LoweringPlan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UserError):
        return None


def keep(path: Path, plan: LoweringPlan) -> None:
    """Write a plan down; a full disk only means that the next run measures again."""
    try:
        write_text_atomic(path, plan.to_json())
    except OSError:
        path.unlink(missing_ok=True)


def _packed(layer: PackedConv2d) -> str:
    together = layer.structure.nnz_per_filter is not None
    shape = layer.structure.shape
    sets = min(len(distinct(layer.structure)), MAX_SETS + 1)
    numbers = f"{layer.structure.density:.2f} {together} {sets}"
    return f"{shape} {numbers} {layer.stride} {layer.padding} {layer.groups}"
