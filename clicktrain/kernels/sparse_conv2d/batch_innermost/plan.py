"""What a layer's kernels need beside its weights: geometry and tiles as text, tables as tensors."""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

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
    indexes = Indexes.of(structure, plan.problem)
    found = [index for phase, tile in plan.tiles.items() for _, index in indexes.get(phase, tile)]
    return plan, [table.to(structure.device) for index in found for table in _written(index)]


class Indexes:
    """Tables of one layer by phase and tile, each made once: a choice among tiles looks at all of them."""

    _latest: ClassVar[list[Indexes]] = []
    """Those of the last layer alone: together they take more memory than its weights."""

    def __init__(self, structure: Structure, problem: ConvProblem) -> None:
        self._structure, self.problem = weakref.ref(structure), problem
        self.values, self.regroup = structure.nnz, structure.patterns is None
        self.forward, self.backward = entries_of(structure, problem.groups)
        self._known: dict[tuple[Phase, str, int, int], list[tuple[Pass, Index]]] = {}

    @classmethod
    def of(cls, structure: Structure, problem: ConvProblem) -> Indexes:
        """Those of a layer, perhaps as they were made for its last call; dtypes and batch do not matter."""
        plain = replace(problem, batch=1, dtype="float32", activations="float32")
        for known in cls._latest:
            if known._structure() is structure and known.problem == plain:
                return known
        cls._latest[:] = [cls(structure, plain)]
        return cls._latest[0]

    def get(self, phase: Phase, tile: Tile) -> list[tuple[Pass, Index]]:
        """The passes of a phase, each with its tables, on the CPU."""
        key = phase, tile.code, tile.m, tile.bk
        if key not in self._known:
            passes = dgrad_passes(self.problem) if phase == "dgrad" else [forward_pass(self.problem)]
            entries = self.backward if phase == "dgrad" else self.forward
            self._known[key] = [
                (one, index_of(phase, entries, one, tile, self.values, self.regroup)) for one in passes
            ]
        return self._known[key]


def index_of(
    phase: Phase, entries: Entries, given: Pass, tile: Tile, values: int, regroup: bool = True
) -> Index:
    """The index of one pass of a phase, cut as a tile says; ``values`` as in `blocks_of`."""
    if tile.code == "rows":
        return rows_of(entries, given, tile.m, phase == "wgrad")
    return blocks_of(entries, given, values, tile.m, tile.bk, regroup)


def _written(index: Index) -> list[Tensor]:
    return [value for name in index.__dataclass_fields__ if isinstance(value := getattr(index, name), Tensor)]


def _read(code: str, tables: Sequence[Tensor]) -> Index:
    a, b, c, d, e, f, g = tables
    return Blocks(a, b, c, d, e, f, g) if code == "blocks" else Rows(a, b, c, d, e, f, g)
