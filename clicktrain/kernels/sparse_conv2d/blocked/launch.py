"""From a layer's structure to functions that can be called: tables, generated code, pointers."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from clicktrain.errors import UserError
from clicktrain.formats.packed import Structure
from clicktrain.kernels.native import compute_type, load, toolchain
from clicktrain.kernels.native.library import call
from clicktrain.kernels.sparse_conv2d.blocked.codegen import scratch_vectors, source
from clicktrain.kernels.sparse_conv2d.blocked.layout import vectors
from clicktrain.kernels.sparse_conv2d.blocked.problem import PHASES, ConvProblem, Phase, Tiling
from clicktrain.kernels.sparse_conv2d.blocked.statistics import moment_vectors
from clicktrain.kernels.sparse_conv2d.blocked.tables import Parts, Table
from clicktrain.kernels.sparse_conv2d.blocked.tap_tables import table as tap_table
from clicktrain.kernels.sparse_conv2d.blocked.tiling import GRAD_WEIGHT_FILTERS, candidates, pair_candidates
from clicktrain.kernels.sparse_conv2d.blocked.vocabulary import Taps, choose, is_complete

STREAM_BYTES = 8 << 20
"""Results of this size are written around the caches: the next reader would not find them there anyway."""
GROUP_SIZES = (4, 2)
"""How many filters that share their positions may be computed together."""


@dataclass(frozen=True, slots=True)
class ConvPlan:
    """What is generated for one layer: everything that the C text depends on, but for the number type.

    Attributes:
        problem: the layer and its image.
        vocabulary: tap sets with code of their own.
        tilings: how each phase cuts its work.
    """

    problem: ConvProblem
    vocabulary: tuple[Taps, ...]
    tilings: tuple[tuple[Phase, Tiling], ...]

    def tiling(self, phase: Phase) -> Tiling:
        """How that phase cuts its work."""
        return dict(self.tilings)[phase]

    def with_tiling(self, phase: Phase, tiling: Tiling) -> ConvPlan:
        """The same plan, one phase cut differently."""
        return replace(self, tilings=tuple((p, tiling if p == phase else t) for p, t in self.tilings))

    def to_json(self) -> str:
        """As text: a key for caches, an argument for operators, a line in a file."""
        tilings = {phase: asdict(tiling) for phase, tiling in self.tilings}
        plan = {"problem": self.problem.numbers(), "vocabulary": self.vocabulary, "tilings": tilings}
        return json.dumps(plan, separators=(",", ":"))

    @classmethod
    @functools.cache
    def from_json(cls, text: str) -> ConvPlan:
        """Inverse of `to_json`."""
        plan = json.loads(text)
        tilings = tuple((phase, Tiling.from_dict(tiling)) for phase, tiling in plan["tilings"].items())
        vocabulary = tuple(tuple(taps) for taps in plan["vocabulary"])
        return cls(ConvProblem.from_numbers(plan["problem"]), vocabulary, tilings)


@dataclass(frozen=True, slots=True)
class ConvTables:
    """A layer's index in the order of each phase: what kernels take beside the activations.

    Attributes:
        tensors: rows, entries and order of forward and gradient of the input; rows, entries, where the
            values are found, and chunks of the gradient of the weight.
    """

    tensors: tuple[Tensor, ...] = field(repr=False)


def prepare(
    structure: Structure, problem: ConvProblem, groups: int = 1, tilings: Mapping[Phase, Tiling] | None = None
) -> tuple[ConvPlan, ConvTables]:
    """Everything about one layer that stays the same over all steps.

    Args:
        structure: the kept positions.
        problem: the layer on its image.
        groups: blocked connections of the convolution.
        tilings: by phase; what is not given is chosen by rule. ``together`` is lowered to what the
            structure allows.
    """
    vocabulary = choose(structure)
    parts = functools.cache(lambda: Parts(structure, vocabulary, groups))
    chosen: list[tuple[Phase, Tiling]] = []
    for phase in PHASES:
        tiling = (tilings or {}).get(phase)
        if tiling is None:
            tiling = _candidates(phase, structure, problem, vocabulary, parts)[0]
        elif tiling.together > 1 and _together(phase, parts()) % tiling.together:
            tiling = replace(tiling, together=1)
        chosen.append((phase, tiling))
    plan = ConvPlan(problem, vocabulary, tuple(chosen))

    def table(phase: Phase) -> Table:
        tiling = plan.tiling(phase)
        if tiling.code == "taps":
            return tap_table(phase, problem, structure, groups, tiling)
        if phase == "forward":
            return parts().by_filter(tiling.together)
        if phase == "grad_input":
            return parts().by_channel()
        return parts().by_kernel(tiling.together, GRAD_WEIGHT_FILTERS)

    forward, back, weight = (table(phase) for phase in PHASES)
    tiling = plan.tiling("grad_weight")
    if tiling.code == "taps":
        chunks = _run_chunks(weight.rows, structure.nnz)
    else:
        chunks = _chunks(weight.rows, weight.entries, vocabulary, tiling.together)
    tables = [forward.rows, forward.entries, forward.order, back.rows, back.entries, back.order]
    # The kernel writes in its own order: where each packed value is found there.
    found = torch.empty_like(weight.order)
    found[weight.order.long()] = torch.arange(len(found), dtype=found.dtype)
    return plan, ConvTables((*tables, weight.rows, weight.entries, found, chunks))


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

    Args:
        structure: the kept positions.
        problem: the layer on its image.
        groups: blocked connections of the convolution.
        dtype: of the activations; bfloat16 is also multiplied in pairs where the processor has that.
    """
    vocabulary = choose(structure)
    parts = functools.cache(lambda: Parts(structure, vocabulary, groups))
    wanted = {phase: _candidates(phase, structure, problem, vocabulary, parts) for phase in PHASES}
    tools = toolchain()
    if dtype is torch.bfloat16 and tools is not None and tools.multiplies_pairs:
        for phase, tilings in wanted.items():
            tilings += pair_candidates(phase, problem, tilings)
    found = []
    # The tables of a phase depend on its own tiling alone: one candidate of each phase at once.
    for number in range(max(map(len, wanted.values()))):
        tried = {phase: tilings[number] for phase, tilings in wanted.items() if number < len(tilings)}
        plan, tables = prepare(structure, problem, groups, tried)
        found += [Variant(phase, plan.tiling(phase), plan.to_json(), list(tables.tensors)) for phase in tried]
    return found


def _candidates(
    phase: Phase,
    structure: Structure,
    problem: ConvProblem,
    vocabulary: tuple[Taps, ...],
    parts: Callable[[], Parts],
) -> list[Tiling]:
    tools = toolchain()
    registers, lanes = (tools.registers, tools.lanes(torch.float32)) if tools else (16, 8)
    complete = is_complete(structure, vocabulary)
    counts = (_together(phase, parts()), 1) if complete else (1,)
    return list(
        dict.fromkeys(
            tiling
            for together in counts
            for tiling in candidates(phase, problem, registers, lanes, together, complete)
        )
    )


def _together(phase: Phase, parts: Parts) -> int:
    """Most filters that may be computed at once."""
    if phase == "grad_input":
        return 1
    return next((size for size in GROUP_SIZES if parts.agree(size)), 1)


def _chunks(rows: Tensor, entries: Tensor, vocabulary: Sequence[Taps], together: int) -> Tensor:
    """Kernels in a few runs of about equal work: [runs, nnz, (first, last, first value) of each run]."""
    sizes = torch.tensor([len(taps) * together for taps in vocabulary] or [0])
    values = torch.cat([torch.zeros(1, dtype=torch.int64), sizes[entries[:, 2].long()].cumsum(0)])
    nnz = int(values[-1])
    wanted = torch.linspace(0, nnz, 17)[1:-1]
    starts = values[rows.long()].contiguous()
    cuts = rows.long()[torch.searchsorted(starts, wanted.long()).clamp(max=len(rows) - 1)]
    edges = torch.unique(torch.cat([torch.tensor([0, len(entries)]), cuts])).tolist()
    flat = [len(edges) - 1, nnz]
    for first, last in itertools.pairwise(edges):
        flat += [first, last, int(values[first])]
    return torch.tensor(flat, dtype=torch.int64)


def _run_chunks(rows: Tensor, nnz: int) -> Tensor:
    """As `_chunks`, for runs of offsets: [chunks, nnz, (first run, last run, unused) of each chunk]."""
    starts = rows[:, 0].long().contiguous()
    wanted = torch.linspace(0, int(starts[-1]), 17)[1:-1].long()
    cuts = torch.searchsorted(starts, wanted).clamp(max=len(rows) - 1)
    edges = torch.unique(torch.cat([torch.tensor([0, len(rows) - 1]), cuts])).tolist()
    flat = [max(len(edges) - 1, 1), nnz]
    for first, last in itertools.pairwise(edges if len(edges) > 1 else [0, 0]):
        flat += [first, last, 0]
    return torch.tensor(flat, dtype=torch.int64)


def _weights(values: Tensor, order: Tensor, tiling: Tiling) -> Tensor:
    """Values as a kernel reads them: in its order, perhaps in pairs of bfloat16."""
    if not tiling.pairs:
        return _ordered(values, order)
    flat = values.reshape(-1).bfloat16()
    return torch.cat([flat, flat.new_zeros(1)]).index_select(0, order)


def _ordered(values: Tensor, order: Tensor) -> Tensor:
    """Values in the order of a kernel; without one, as they are."""
    flat = values.reshape(-1)
    return flat.index_select(0, order) if order.numel() else flat.contiguous()


def compile_plan(
    plan: str, dtype: torch.dtype, phases: Sequence[Phase] = PHASES, sums: bool = False
) -> list[str]:
    """The C texts of a plan's phases, to be built ahead of their first use; forward perhaps with sums."""
    return [_text(plan, dtype, phase, sums and phase == "forward") for phase in phases]


def forward(x: Tensor, values: Tensor, bias: Tensor | None, tables: Sequence[Tensor], plan: str) -> Tensor:
    """[B, C, H, W, V] -> [B, F, H', W', V]."""
    kernel = _kernel(plan, x.dtype, "forward")
    _check(x, values, bias)
    y = x.new_empty(output_shape(x, kernel.plan.problem))
    bias = None if bias is None else bias.contiguous()
    weights = _weights(values, tables[2], kernel.tiling)
    kernel.run(vectors(x), y, weights, bias, tables[0], tables[1])
    return y


def forward_statistics(
    x: Tensor, values: Tensor, bias: Tensor | None, tables: Sequence[Tensor], plan: str, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward`; also mean and biased variance [F] of the results of ``n`` images."""
    lanes = x.shape[4]
    if not max((x.shape[0] - 1) * lanes, 0) < n <= x.shape[0] * lanes:
        raise UserError(f"{x.shape[0]} blocks of {lanes} lanes hold no batch of {n} images to take a mean of")
    kernel = _kernel(plan, x.dtype, "forward", sums=True)
    _check(x, values, bias)
    y = x.new_empty(output_shape(x, kernel.plan.problem))
    mean, var = values.new_empty(y.shape[1]), values.new_empty(y.shape[1])
    bias = None if bias is None else bias.contiguous()
    weights = _weights(values, tables[2], kernel.tiling)
    kernel.run(vectors(x), y, weights, bias, tables[0], tables[1], mean, var, images=n)
    return y, mean, var


def output_shape(x: Tensor, problem: ConvProblem) -> tuple[int, int, int, int, int]:
    """Of a convolution's result, [B, F, H', W', V]."""
    return x.shape[0], problem.filters, problem.rows.out, problem.columns.out, x.shape[4]


def grad_input(gy: Tensor, values: Tensor, tables: Sequence[Tensor], plan: str) -> Tensor:
    """[B, F, H', W', V] -> [B, C, H, W, V]."""
    kernel = _kernel(plan, gy.dtype, "grad_input")
    _check(gy, values)
    problem = kernel.plan.problem
    gx = gy.new_empty(gy.shape[0], problem.channels, problem.rows.size, problem.columns.size, gy.shape[4])
    weights = _weights(values, tables[5], kernel.tiling)
    kernel.run(vectors(gy), gx, weights, None, tables[3], tables[4])
    return gx


def grad_weight(
    x: Tensor, gy: Tensor, values_shape: Sequence[int], tables: Sequence[Tensor], plan: str
) -> Tensor:
    """Activations and output gradients -> gradient of the packed values."""
    kernel = _kernel(plan, x.dtype, "grad_weight")
    _check(x)
    if gy.dtype is not x.dtype:
        raise UserError(
            f"the output's gradient is of {gy.dtype}, the input of {x.dtype}: both have to be alike"
        )
    order, chunks = tables[8], tables[9]
    found = x.new_empty(int(chunks[1]), dtype=compute_type(x.dtype))
    few = x.shape[0] * kernel.regions < 4 * kernel.images * torch.get_num_threads()
    whole = chunks if few else _one_chunk(chunks)
    kernel.run(vectors(x), vectors(gy), found, tables[6], tables[7], whole)
    return _ordered(found, order).view(tuple(values_shape))


def _check(x: Tensor, *parameters: Tensor | None) -> None:
    """Refuse what the generated code would misread: it takes pointers.

    Raises:
        UserError: number types that do not fit each other, or other lanes than this processor has.
    """
    computed, tools = compute_type(x.dtype), toolchain()
    for one in parameters:
        if one is not None and one.dtype is not computed:
            raise UserError(
                f"a blocked convolution of {x.dtype} has weights and bias of {computed}, not of {one.dtype}"
            )
    lanes = tools.lanes(x.dtype) if tools else 0
    if x.dim() != 5 or x.shape[4] != lanes:
        raise UserError(
            f"a blocked convolution takes [B, C, H, W, {lanes}] of {x.dtype} here, not {list(x.shape)}: "
            "convert with block_batch"
        )


def _one_chunk(chunks: Tensor) -> Tensor:
    return torch.tensor([1, int(chunks[1]), 0, int(chunks[-2]), 0], dtype=torch.int64)


class _Kernel:
    """One loaded function with what it needs to be called."""

    def __init__(self, plan: ConvPlan, dtype: torch.dtype, phase: Phase, text: str, sums: bool) -> None:
        self.plan, self.phase, self.dtype = plan, phase, dtype
        self._run = load(text).run
        self.tiling = plan.tiling(phase)
        self._computed = compute_type(dtype)
        self._scratch = scratch_vectors(phase, plan.problem, self.tiling, dtype)
        if sums:
            self._scratch += moment_vectors(plan.problem.filters, self._computed)
        self.regions = region_count(phase, plan.problem, self.tiling)
        self.images = self.tiling.images

    def run(self, first: Tensor, *rest: Tensor | None, images: int | None = None) -> None:
        threads = torch.get_num_threads()
        lanes = first.shape[4]
        vectors_each = self._scratch
        if self.phase == "grad_weight":
            result = rest[1]
            assert result is not None
            vectors_each += -(-result.numel() // lanes)
        scratch = first.new_empty(max(vectors_each * threads, 1) * lanes, dtype=self._computed)
        if first.numel():
            numbers = [first.shape[0], threads]
            if self.phase != "grad_weight":
                result = rest[0]
                assert result is not None
                numbers.insert(1, int(result.numel() * result.itemsize >= STREAM_BYTES))
            if images is not None:
                numbers.insert(0, images)
            call(self._run, first, *rest, scratch, *numbers)
        elif self.phase == "grad_weight":
            rest[1].zero_()  # type: ignore[union-attr]


def region_count(phase: Phase, problem: ConvProblem, tiling: Tiling) -> int:
    """Regions of one block of images."""
    sizes = (
        (problem.rows.size, problem.columns.size)
        if phase == "grad_input"
        else (problem.rows.out, problem.columns.out)
    )
    count = 1
    for size, tile, region in zip(sizes, tiling.tile, tiling.region, strict=True):
        tiles = -(-size // tile)
        count *= -(-tiles // region)
    return count


@functools.cache
def _text(plan: str, dtype: torch.dtype, phase: Phase, sums: bool = False) -> str:
    tools = toolchain()
    if tools is None:
        raise RuntimeError("there is no C compiler: install gcc or clang, or name one in CC")
    parsed = ConvPlan.from_json(plan)
    tiling, lanes = parsed.tiling(phase), tools.lanes(dtype)
    return source(phase, parsed.problem, parsed.vocabulary, tiling, dtype, lanes, sums)


@functools.cache
def _kernel(plan: str, dtype: torch.dtype, phase: Phase, sums: bool = False) -> _Kernel:
    return _Kernel(ConvPlan.from_json(plan), dtype, phase, _text(plan, dtype, phase, sums), sums)
