"""What is computed of a layer before its first step: its tilings, and its index in each loop's order."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from clicktrain.formats.packed import Structure
from clicktrain.kernels.native import compute_type, toolchain
from clicktrain.kernels.sparse_conv2d.blocked.indexed.tables import table as indexed_table
from clicktrain.kernels.sparse_conv2d.blocked.patterns.pairs import in_pairs, pair_taps
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tables import Parts, Table
from clicktrain.kernels.sparse_conv2d.blocked.patterns.tap_patterns import Taps, choose, is_complete
from clicktrain.kernels.sparse_conv2d.blocked.problem import PHASES, ConvProblem, Phase, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.tiling import WGRAD_FILTERS, candidates, pair_candidates

GROUP_SIZES = (4, 2)
"""How many filters that share their positions may be computed together."""


@dataclass(frozen=True, slots=True)
class ConvPlan:
    """Everything that a layer's C source depends on, except the dtype; tap patterns have own code."""

    problem: ConvProblem
    tap_patterns: tuple[Taps, ...]
    tilings: tuple[tuple[Phase, Tiling], ...]

    def tiling(self, phase: Phase) -> Tiling:
        """How that phase cuts its work."""
        return dict(self.tilings)[phase]

    def to_json(self) -> str:
        """As text: a key for caches, an argument for operators, a line in a file."""
        tilings = {phase: asdict(tiling) for phase, tiling in self.tilings}
        plan = {"problem": self.problem.numbers(), "tap_patterns": self.tap_patterns, "tilings": tilings}
        return json.dumps(plan, separators=(",", ":"))

    @classmethod
    @functools.cache
    def from_json(cls, text: str) -> ConvPlan:
        """Inverse of `to_json`."""
        plan = json.loads(text)
        tilings = tuple((phase, Tiling.from_dict(tiling)) for phase, tiling in plan["tilings"].items())
        tap_patterns = tuple(tuple(taps) for taps in plan["tap_patterns"])
        return cls(ConvProblem.from_numbers(plan["problem"]), tap_patterns, tilings)


def prepare(
    structure: Structure, problem: ConvProblem, groups: int = 1, tilings: Mapping[Phase, Tiling] | None = None
) -> tuple[ConvPlan, tuple[Tensor, ...]]:
    """Everything about one layer that stays the same over all steps, or until its positions move.

    Where they move, the plan and with it all code depend on the patterns that may come, not on the positions
    of the moment: `prepare` for another mask, with the same tilings, gives the same plan and other tables.
    Phases without a tiling are cut by rule; ``filters_per_tile`` is lowered to what the structure allows.

    Returns:
        The plan, and the layer's index in the order of each phase: rows, entries and order of forward and
        dgrad; rows, entries, places of the values, and chunks of wgrad.
    """
    tap_patterns = choose(structure)
    parts = functools.cache(lambda: Parts(structure, tap_patterns, groups))
    chosen: list[tuple[Phase, Tiling]] = []
    for phase in PHASES:
        tiling = (tilings or {}).get(phase)
        if tiling is None:
            tiling = _candidates(phase, structure, problem, tap_patterns, parts)[0]
        elif (
            tiling.filters_per_tile > 1
            and _filters_per_tile(phase, structure, parts) % tiling.filters_per_tile
        ):
            tiling = replace(tiling, filters_per_tile=1)
        chosen.append((phase, tiling))
    plan = ConvPlan(problem, tap_patterns, tuple(chosen))

    def paired(phase: Phase, table: Table) -> Table:
        tiling = plan.tiling(phase)
        if not tiling.pairs:
            return table
        pairs = [pair_taps(taps, phase, problem) for taps in tap_patterns]
        return in_pairs(table, tap_patterns, pairs, tiling)

    def table(phase: Phase) -> Table:
        tiling = plan.tiling(phase)
        if tiling.code == "indexed":
            return indexed_table(phase, problem, structure, groups, tiling)
        if tiling.code == "cache_blocked" and phase != "wgrad":
            return parts().by_block(phase == "dgrad", tiling.results, tiling.sources)
        if phase == "forward":
            return paired(phase, parts().by_filter(tiling.filters_per_tile, tiling.sources))
        if phase == "dgrad":
            return paired(phase, parts().by_channel(tiling.sources))
        return parts().by_kernel(tiling.filters_per_tile, WGRAD_FILTERS)

    forward, back, weight = (table(phase) for phase in PHASES)
    tiling = plan.tiling("wgrad")
    if tiling.code == "indexed":
        chunks = _run_chunks(weight.rows, structure.nnz)
    else:
        chunks = _chunks(weight.rows, weight.entries, tap_patterns, tiling.filters_per_tile)
    tables = [forward.rows, forward.entries, forward.order, back.rows, back.entries, back.order]
    # The kernel writes in its own order: this is the place of each packed value there.
    places = torch.empty_like(weight.order)
    places[weight.order.long()] = torch.arange(len(places), dtype=places.dtype)
    return plan, (*tables, weight.rows, weight.entries, places, chunks)


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel that could do one phase of one layer: what its operator takes beside activations."""

    phase: Phase
    tiling: Tiling
    plan: str
    tables: list[Tensor]


def variants(
    structure: Structure, problem: ConvProblem, groups: int = 1, dtype: torch.dtype = torch.float32
) -> list[Variant]:
    """All that is worth measuring for a layer, of each phase the rule's own choice first.

    Activations of bfloat16 are also multiplied in pairs where the processor has that.
    """
    tap_patterns = choose(structure)
    parts = functools.cache(lambda: Parts(structure, tap_patterns, groups))
    copied = dtype is not compute_type(dtype)
    wanted = {phase: _candidates(phase, structure, problem, tap_patterns, parts, copied) for phase in PHASES}
    tools = toolchain()
    if dtype is torch.bfloat16 and tools is not None and tools.simd.pairs:
        lanes, complete = tools.lanes(torch.float32), is_complete(structure, tap_patterns)
        for phase, tilings in wanted.items():
            registers = tools.simd.registers
            wanted[phase] = pair_candidates(phase, problem, tilings, registers, lanes, complete)
    result = []
    # The tables of a phase depend on its own tiling alone: one candidate of each phase at once.
    for number in range(max(map(len, wanted.values()))):
        tried = {phase: tilings[number] for phase, tilings in wanted.items() if number < len(tilings)}
        plan, tables = prepare(structure, problem, groups, tried)
        result += [Variant(phase, plan.tiling(phase), plan.to_json(), list(tables)) for phase in tried]
    return result


def _candidates(
    phase: Phase,
    structure: Structure,
    problem: ConvProblem,
    tap_patterns: tuple[Taps, ...],
    parts: Callable[[], Parts],
    copied: bool = False,
) -> list[Tiling]:
    tools = toolchain()
    registers, lanes = (tools.simd.registers, tools.lanes(torch.float32)) if tools else (16, 8)
    complete = is_complete(structure, tap_patterns)
    counts = (_filters_per_tile(phase, structure, parts), 1) if complete else (1,)
    about = phase, problem, registers, lanes, tap_patterns
    every = (_known_candidates(*about, n, complete, copied) for n in counts)
    return list(dict.fromkeys(itertools.chain.from_iterable(every)))


_known_candidates = functools.lru_cache(maxsize=1024)(candidates)
"""Milliseconds for a layer, which would count where tables are made again for masks that move."""


def _filters_per_tile(phase: Phase, structure: Structure, parts: Callable[[], Parts]) -> int:
    """How many neighboring filters share their positions; where these move they need not for long."""
    if phase == "dgrad" or structure.patterns is not None:
        return 1
    return next((size for size in GROUP_SIZES if parts().agree(size)), 1)


def _chunks(rows: Tensor, entries: Tensor, tap_patterns: Sequence[Taps], filters_per_tile: int) -> Tensor:
    """Kernels in a few runs of about equal work: [runs, nnz, (first, last, first value) of each run]."""
    sizes = torch.tensor([len(taps) * filters_per_tile for taps in tap_patterns] or [0])
    values = torch.cat([torch.zeros(1, dtype=torch.int64), sizes[entries[:, 2].long()].cumsum(0)])
    edges = _edges(values[rows.long()], len(rows) - 1, rows.long(), len(entries))
    flat = [len(edges) - 1, int(values[-1])]
    for first, last in itertools.pairwise(edges):
        flat += [first, last, int(values[first])]
    return torch.tensor(flat, dtype=torch.int64)


def _run_chunks(rows: Tensor, nnz: int) -> Tensor:
    """As `_chunks`, for runs of offsets: [chunks, nnz, (first run, last run, unused) of each chunk]."""
    runs = len(rows) - 1
    edges = _edges(rows[:, 0].long(), runs, torch.arange(len(rows)), runs)
    flat = [max(len(edges) - 1, 1), nnz]
    for first, last in itertools.pairwise(edges if len(edges) > 1 else [0, 0]):
        flat += [first, last, 0]
    return torch.tensor(flat, dtype=torch.int64)


def _edges(starts: Tensor, most: int, places: Tensor, end: int) -> list[int]:
    """Cut at 15 of ``places``, which begin after ``starts`` values, into parts of about as many values."""
    wanted = torch.linspace(0, int(starts[-1]), 17)[1:-1].long()
    cuts = places[torch.searchsorted(starts.contiguous(), wanted).clamp(max=most)]
    return [int(edge) for edge in torch.unique(torch.cat([torch.tensor([0, end]), cuts]))]
