"""Whole training steps: the accelerated packed network beside the best dense one (section 5.4)."""

from __future__ import annotations

import copy
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.bench.conv import check_precisions
from clicktrain.bench.masks import check_sparsity, model_masks
from clicktrain.bench.memory import in_fresh_process, peak_mb
from clicktrain.bench.timing import (
    Progress,
    WrongResultError,
    autocast,
    channels_last,
    check_rounds,
    fastest,
    median_ms,
    need_compiler,
)
from clicktrain.bench.timing import to_json as to_json
from clicktrain.compiler import Accelerated, LoweringPlan, accelerate
from clicktrain.errors import UserError
from clicktrain.kernels.native import keep_memory
from clicktrain.kernels.native.failure import summary, watch_failures
from clicktrain.kernels.pack_model import pack_model_
from clicktrain.kernels.sparse_conv2d import PackedConv2d
from clicktrain.models import create_model

WARMUP = 2
"""Steps before those that count: optimizer state is made in the first, code compiled."""
CLASSES = 10
GRADIENT_TOLERANCE = 0.03
"""Largest error of a gradient over its length, see `check_same`."""


@dataclass(frozen=True, slots=True)
class StepCase:
    """A network and a batch, the same ones in every process; a CIFAR stem is used up to 64 pixels.

    ``model`` is a zoo name, or ``package.module:factory``; ``seed`` that of weights, positions and data;
    ``width`` a factor on all channels.
    """

    model: str = "resnet18"
    batch_size: int = 64
    image_size: int = 32
    seed: int = 0
    width: float = 1.0

    def network(self) -> nn.Module:
        """Dense, in training mode; without dropout, whose choices depend on layout and precision."""
        torch.manual_seed(self.seed)
        stem = "cifar" if self.image_size <= 64 else "imagenet"
        model = create_model(self.model, num_classes=CLASSES, stem=stem, width=self.width)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.train()

    def packed(self, compression: float, group: int) -> nn.Module:
        """The same with random positions, packed."""
        model = self.network()
        pack_model_(model, model_masks(model, compression, group, self.seed))
        return model

    def batch(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.batch_size, 3, self.image_size, self.image_size, generator=generator)
        return x, torch.randint(CLASSES, (self.batch_size,), generator=generator)


@dataclass(frozen=True, slots=True)
class StepRow:
    """One network at one compression.

    Attributes:
        density: kept weights of the packed layers over all of theirs.
        dense_fp32_ms, dense_bf16_ms: the fastest dense step, in float32 and under bfloat16 autocast; None if
            not asked for.
        precision: of the accelerated step: ``fp32``, or ``bf16`` for one under autocast whose activations the
            compiler may keep in bfloat16.
        activations: what it keeps them in, see `clicktrain.compiler.LoweringPlan`.
        ratio_fp32, ratio_bf16: dense over accelerated.
        dense_memory_mb: peak memory of the leaner eager step in that precision.
    """

    model: str
    compression: float
    group: int
    density: float
    dense_fp32_ms: float
    dense_fp32_name: str
    dense_bf16_ms: float | None
    dense_bf16_name: str | None
    precision: str
    activations: str
    sparse_ms: float
    ratio_fp32: float
    ratio_bf16: float | None
    dense_memory_mb: float | None
    dense_memory_name: str | None
    sparse_memory_mb: float | None


def bench_step(
    case: StepCase,
    *,
    compressions: tuple[float, ...] = (4.0, 10.0),
    groups: tuple[int, ...] = (1,),
    precisions: tuple[str, ...] = ("fp32",),
    rounds: int = 7,
    compiled: bool = True,
    bf16: bool = True,
    memory: bool = True,
    rule: str = "measured",
    progress: Progress = lambda text: None,
) -> list[StepRow]:
    """Time forward, loss, backward and SGD with momentum; every network on the same batch, interleaved.

    ``compressions``, ``groups`` and ``precisions`` of the accelerated steps are as in `bench_conv`; ``rule``
    is how the compiler chooses operators. Also measured: the dense network under ``torch.compile``, channels
    last (``compiled``), dense steps under bfloat16 autocast (``bf16``), and the peak memory of each step, in
    a process of its own (``memory``).

    Raises:
        UserError: a setting that cannot be.
        WrongResultError: the accelerated network has another loss or other gradients than the packed one.
    """
    check_rounds(rounds)
    check_sparsity(compressions, groups)
    check_precisions(precisions)
    if case.batch_size < 1 or case.image_size < 1:
        raise UserError(
            f"batch_size and image_size must be at least 1, not {case.batch_size} and {case.image_size}"
        )
    need_compiler()
    keep_memory()  # for both sides: else what is timed is how the system hands out pages
    calls: dict[tuple[str, str] | _Sparse, Callable[[], object]] = {}
    sparse = list(itertools.starmap(_Sparse, itertools.product(compressions, groups, precisions)))
    densities: dict[_Sparse, float] = {}
    plans: dict[_Sparse, LoweringPlan | None] = {}
    for one in sparse:
        calls[one], densities[one], plans[one] = _accelerated(case, one, rule, progress)
    progress("building the dense networks")
    names = _dense_names(compiled, bf16)
    calls.update({key: _dense_step(case, *key) for key in names})
    progress("timing")
    times = median_ms(calls, rounds, warmup=WARMUP)
    fp32 = fastest({name: times[kind, name] for kind, name in names if kind == "fp32"})
    low = {name: times[kind, name] for kind, name in names if kind == "bf16"}
    low_name, low_ms = fastest(low) if low else (None, None)
    calls.clear()
    dense_peaks, sparse_peaks = _peaks(case, plans, precisions, progress) if memory else ({}, {})
    rows = []
    for one in sparse:
        ms, plan = times[one], plans[one]
        name, megabytes = dense_peaks.get(one.precision, (None, None))
        rows.append(
            StepRow(
                model=case.model,
                compression=one.compression,
                group=one.group,
                density=densities[one],
                dense_fp32_ms=fp32[1],
                dense_fp32_name=fp32[0],
                dense_bf16_ms=low_ms,
                dense_bf16_name=low_name,
                precision=one.precision,
                activations="parameters" if plan is None else plan.activations,
                sparse_ms=ms,
                ratio_fp32=fp32[1] / ms,
                ratio_bf16=None if low_ms is None else low_ms / ms,
                dense_memory_mb=megabytes,
                dense_memory_name=name,
                sparse_memory_mb=sparse_peaks.get(one),
            )
        )
    return rows


def accelerated(model: nn.Module, example: Tensor, **settings: Any) -> nn.Module:
    """`accelerate` with the same arguments, its other warnings included.

    Raises:
        UserError: there is no C compiler that works, or it fails on a kernel.
    """
    need_compiler()
    with watch_failures() as failures, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fast = accelerate(model, example, **settings)
    if failures:
        raise UserError(f"there would be nothing to compare: {summary(failures)}")
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return fast


class _Sparse(NamedTuple):
    """One accelerated network."""

    compression: float
    group: int
    precision: str

    def __str__(self) -> str:
        return f"{self.compression:g}x, group {self.group}, {self.precision}"

    @property
    def bf16(self) -> bool:
        """Whether its steps run under autocast."""
        return self.precision == "bf16"


def _accelerated(
    case: StepCase, one: _Sparse, rule: str, progress: Progress
) -> tuple[TrainingStep, float, LoweringPlan | None]:
    """A training step that was checked against the packed network, with its density and its plan."""
    progress(f"accelerating at {one}")
    packed, (x, y) = case.packed(one.compression, one.group), case.batch()
    # As the trainer does it, with fresh measurements.
    dtypes = ("fp32", "bf16") if one.bf16 else ("fp32",)
    fast = accelerated(copy.deepcopy(packed), x, rule=rule, dtypes=dtypes, remember=False)
    progress(f"checking at {one}")
    check_same(packed, fast, x, y, bf16=one.bf16)
    plan = fast.plan if isinstance(fast, Accelerated) and fast.active else None
    return TrainingStep(fast, x, y, bf16=one.bf16), _density(packed), plan


def _peaks(
    case: StepCase, plans: Mapping[_Sparse, LoweringPlan | None], kinds: Sequence[str], progress: Progress
) -> tuple[dict[str, tuple[str, float]], dict[_Sparse, float]]:
    """Peak memory of the leaner dense step in each precision, with its name, and of each accelerated one."""
    dense = {}
    for kind in kinds:
        progress(f"memory of the dense step in {kind}")
        layouts = ("NCHW", "channels_last")
        dense[kind] = fastest({name: _memory(case, layout=name, kind=kind) for name in layouts})
    sparse = {}
    for one, plan in plans.items():
        progress(f"memory at {one}")
        sparse[one] = _memory(case, sparse=one, plan=None if plan is None else plan.to_json())
    return dense, sparse


def check_same(reference: nn.Module, fast: nn.Module, x: Tensor, y: Tensor, bf16: bool = False) -> None:
    """Compare loss and gradients of two networks with the same parameters.

    Both are held against the reference in float64. The loss has to agree closely. Gradients cannot: where
    rounding carries one input of a ReLU over zero, they jump; between two dense layouts of one network they
    differ by half a percent already. A wrong kernel or a wrong graph is off by far more. With ``bf16``
    both run under autocast: all gradients together may be off by twice what the reference's are, each by
    more, by chance.

    Raises:
        WrongResultError: they differ, or a parameter is missing.
    """
    exact_loss, exact = _gradients(copy.deepcopy(reference).double(), x.double(), y)
    loss, own = _gradients(copy.deepcopy(reference), x, y, bf16)
    fast_loss, fast_gradients = _gradients(fast, x, y, bf16)
    fast.zero_grad()
    if fast_gradients.keys() != exact.keys():
        different = ", ".join(sorted(fast_gradients.keys() ^ exact.keys()))
        raise WrongResultError(f"the accelerated network has other parameters: {different}")
    near = 2e-2 if bf16 else 1e-5  # a loss in bfloat16 agrees by chance
    allowed = (2 if bf16 else 20) * abs(loss - exact_loss) + near * max(abs(exact_loss), 1)
    if not abs(fast_loss - exact_loss) <= allowed:
        raise WrongResultError(f"the accelerated network's loss is {fast_loss:.6f}, not {exact_loss:.6f}")
    if bf16:
        joined = [torch.cat([g.flatten() for g in one.values()]) for one in (exact, own, fast_gradients)]
        _near("all parameters", *joined, times=2, room=0)
    total = max(float(gradient.norm()) for gradient in exact.values())
    for name, gradient in exact.items():
        _near(name, gradient, own[name], fast_gradients[name], times=20, room=1e-6 * total)


def _near(name: str, exact: Tensor, own: Tensor, fast: Tensor, *, times: float, room: float) -> None:
    """Raise WrongResultError if a gradient's error is over a multiple of the reference's own."""
    length = float(exact.norm())
    error, usual = (float((one.double() - exact).norm()) for one in (fast, own))
    if not error <= times * usual + GRADIENT_TOLERANCE * length + room:
        raise WrongResultError(
            f"the accelerated network's gradient of {name} is off by {error:.2g}; "
            f"its length is {length:.2g}, the reference is off by {usual:.2g}"
        )


def _gradients(model: nn.Module, x: Tensor, y: Tensor, bf16: bool = False) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    with autocast(bf16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: p.grad.detach().clone() if p.grad is not None else torch.zeros_like(p)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return loss.item(), gradients


def _density(packed: nn.Module) -> float:
    structures = [m.structure for m in packed.modules() if isinstance(m, PackedConv2d)]
    if not structures:
        raise UserError("the network has no convolution that could be packed")
    return float(sum(s.nnz for s in structures) / sum(s.numel for s in structures))


def _dense_names(compiled: bool, bf16: bool) -> list[tuple[str, str]]:
    names = ["NCHW", "channels_last", *(["channels_last compile"] if compiled else [])]
    return [(kind, name) for kind in (("fp32", "bf16") if bf16 else ("fp32",)) for name in names]


def _dense_step(case: StepCase, kind: str, name: str) -> TrainingStep:
    model, (x, y) = case.network(), case.batch()
    if name.startswith("channels_last"):
        model, x = channels_last(model, x)
    if name.endswith("compile"):
        # A module's own compile keeps the module; code is generated again for each one's parameters.
        model.compile(dynamic=False)
    return TrainingStep(model, x, y, bf16=kind == "bf16")


class TrainingStep:
    """A network with its optimizer and its batch; calling it does one training step."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, bf16: bool = False) -> None:
        self.model, self.x, self.y, self.bf16 = model, x, y, bf16
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def __call__(self) -> None:
        """Do one step."""
        self.optimizer.zero_grad()
        with autocast(self.bf16):
            loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def _memory(case: StepCase, **what: Any) -> float:
    """Peak of one step, of the dense network in a ``layout`` and ``kind`` or of a ``sparse`` one."""
    argument = {"case": asdict(case), "threads": torch.get_num_threads(), **what}
    return in_fresh_process("clicktrain.bench.step", argument)


def _main(text: str) -> None:
    """In a process of its own: print the peak memory of what `_memory` asked for."""
    what = json.loads(text)
    torch.set_num_threads(what["threads"])
    case = StepCase(**what["case"])

    def prepare() -> TrainingStep:
        if "layout" in what:
            return _dense_step(case, what["kind"], what["layout"])
        one = _Sparse(*what["sparse"])
        packed = case.packed(one.compression, one.group)
        fast = packed
        if what["plan"] is not None:
            fast = accelerate(packed, case.batch()[0], plan=LoweringPlan.from_json(what["plan"]))
        return TrainingStep(fast, *case.batch(), bf16=one.bf16)

    # What libraries take when they are first used is neither side's: both begin with it.
    tiny = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES)
    )
    TrainingStep(tiny, torch.randn(2, 3, 5, 5), torch.zeros(2, dtype=torch.int64))()
    print(peak_mb(prepare))


if __name__ == "__main__":
    _main(sys.argv[1])
