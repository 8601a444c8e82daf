"""What a layer's kernels need beside its weights: geometry and tiles as text, tables as tensors."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from clicktrain.formats.packed import Structure
from clicktrain.kernels.impls import PHASES, ConvProblem, Phase
from clicktrain.kernels.sparse_conv2d.batch_innermost.index import (
    Blocks,
    Entries,
    Rows,
    blocks_of,
    entries_of,
    rows_of,
)
from clicktrain.kernels.sparse_conv2d.batch_innermost.passes import Pass, dgrad_passes, forward_pass
from clicktrain.kernels.sparse_conv2d.batch_innermost.tiles import Tile

Index = Blocks | Rows
_TABLES = 7
"""Tensors of an index."""


@dataclass(frozen=True)
class ConvPlan:
    """The geometry of a layer and how each phase cuts its work.

    Attributes:
        problem: its batch does not matter.
        tiles: by phase; a plan of which some phases alone are run has no others.
    """

    problem: ConvProblem
    tiles: Mapping[Phase, Tile]

    def to_json(self) -> str:
        """As text; `from_json` is the inverse."""
        tiles = {phase: tile.to_dict() for phase, tile in self.tiles.items()}
        return json.dumps([self.problem.to_json(), tiles])

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def from_json(text: str) -> ConvPlan:
        """Read a plan; the same object for the same text."""
        problem, tiles = json.loads(text)
        return ConvPlan(
            ConvProblem.from_json(problem), {phase: Tile.from_dict(tile) for phase, tile in tiles.items()}
        )

    @functools.cached_property
    def forward_pass(self) -> Pass:
        """The pass of forward and wgrad."""
        return forward_pass(self.problem)

    @functools.cached_property
    def dgrad_passes(self) -> list[Pass]:
        """The passes of dgrad."""
        return dgrad_passes(self.problem)

    def passes(self, phase: Phase) -> list[Pass]:
        """The passes of a phase."""
        return self.dgrad_passes if phase == "dgrad" else [self.forward_pass]

    def indexes(self, phase: Phase, tables: Sequence[Tensor]) -> list[Index]:
        """The tables of a phase, one index for each of its passes."""
        first = 0
        for other in PHASES:
            if other == phase:
                break
            first += len(self.passes(other)) if other in self.tiles else 0
        code = self.tiles[phase].code
        return [
            _read(code, tables[at * _TABLES : (at + 1) * _TABLES])
            for at in range(first, first + len(self.passes(phase)))
        ]


def make_plan(
    structure: Structure, problem: ConvProblem, tiles: Mapping[Phase, Tile]
) -> tuple[ConvPlan, list[Tensor]]:
    """The plan and the tables of a layer, on its device, for the phases that have a tile.

    Rows are put together by their keys only where masks are frozen: it takes as long as a training step.
    """
    plan = ConvPlan(replace(problem, batch=1), {phase: tiles[phase] for phase in PHASES if phase in tiles})
    forward, backward = entries_of(structure, problem.groups)
    frozen = structure.patterns is None
    found = [
        index_of(backward if phase == "dgrad" else forward, one, tile, structure.nnz, frozen)
        for phase, tile in plan.tiles.items()
        for one in plan.passes(phase)
    ]
    return plan, [table.to(structure.device) for index in found for table in _written(index)]


def index_of(entries: Entries, given: Pass, tile: Tile, values: int, regroup: bool = True) -> Index:
    """The index of one pass of a phase, cut as a tile says; ``values`` as in `blocks_of`."""
    if tile.code == "rows":
        return rows_of(entries, given, tile.m, tile.bk)
    return blocks_of(entries, given, values, tile.m, tile.bk, regroup)


def _written(index: Index) -> list[Tensor]:
    return [value for name in index.__dataclass_fields__ if isinstance(value := getattr(index, name), Tensor)]


def _read(code: str, tables: Sequence[Tensor]) -> Index:
    a, b, c, d, e, f, g = tables
    return Blocks(a, b, c, d, e, f, g) if code == "blocks" else Rows(a, b, c, d, e, f, g)
