"""Times engines side by side: same network, same images, same threads, turns in every round."""

from __future__ import annotations

import itertools
import shutil
import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from clicktrain.bench.inference.case import InferenceCase, Networks
from clicktrain.bench.inference.engines import ENGINES, Call, read
from clicktrain.bench.masks import check_sparsity
from clicktrain.bench.timing import Progress, WrongResultError, check_rounds
from clicktrain.errors import UserError, shown
from clicktrain.kernels.native import keep_memory
from clicktrain.latency.timer import timed_for

PRECISIONS = ("fp32", "bf16", "int8")
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "int8": 0.3}
"""Largest error of a logit, over the largest logit, beyond which a time would mean nothing."""
FULL = 16
"""Images in one timing at least, so that short calls are timed together."""
SECONDS = 30.0
"""Limit of the rounds for one batch of one network: with all that is prepared, the default call is to take
less than 20 minutes."""
LEAST_ROUNDS = 5
"""Rounds however long they take."""


@dataclass(frozen=True, slots=True)
class InferenceRow:
    """One engine on one network, batch and number of threads.

    Attributes:
        compression: of the network that was run, whatever the engine makes of its zeros.
        group: neighboring filters that share their positions.
        ms: median milliseconds of a call, over ``rounds`` timings.
        max_error: largest difference from float64 outputs, over the largest of these.
        ratio: ``ms`` of the fastest other engine in the same precision that computes zeros too, over this.
    """

    model: str
    compression: float
    group: int
    batch: int
    threads: int
    engine: str
    precision: str
    ms: float
    max_error: float
    ratio: float | None
    rounds: int


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """What has no row, and why."""

    engine: str
    precision: str
    batch: int
    reason: str


_Times: TypeAlias = dict[tuple[str, str], tuple[list[float], float]]
"""(engine, precision) -> milliseconds of each round, and the error."""


def bench_inference(
    model: str = "resnet18",
    *,
    compressions: tuple[float, ...] = (4.0, 10.0),
    groups: tuple[int, ...] = (1,),
    batches: tuple[int, ...] = (1, 16, 64),
    threads: int = 1,
    engines: tuple[str, ...] = tuple(ENGINES),
    precisions: tuple[str, ...] = PRECISIONS,
    image_size: int = 32,
    rounds: int = 31,
    seconds: float = SECONDS,
    progress: Progress = lambda text: None,
) -> tuple[list[InferenceRow], list[NotMeasured]]:
    """Time every engine on networks with patterns and kernels; results are held against float64 first.

    ``rounds`` are the most, of which there are fewer, but `LEAST_ROUNDS`, where they take longer than
    ``seconds`` for one batch of one network.

    Engines whose packages are not installed are left out, and said to be. An engine that fails, or computes
    something else, has no row either: the reason is among what was not measured.

    Raises:
        UserError: a setting that cannot be.
    """
    check_rounds(rounds)
    check_sparsity(compressions, groups)
    _check("engine", engines, ENGINES)
    _check("precision", precisions, PRECISIONS)
    for name, numbers in (("batch", batches), ("threads", (threads,)), ("image_size", (image_size,))):
        if not numbers or min(numbers) < 1:
            raise UserError(f"{name} is {shown(list(numbers))}: give numbers of at least 1")
    keep_memory()  # for all sides
    rows: list[InferenceRow] = []
    missing: dict[tuple[str, str, int, str], NotMeasured] = {}

    def note(engine: str, precision: str, batch: int, reason: str) -> None:
        missing[engine, precision, batch, reason] = NotMeasured(engine, precision, batch, reason)

    wanted = [(name, p) for name in engines for p in precisions if p in ENGINES[name].precisions]
    for name, precision in list(wanted):
        if reason := ENGINES[name].refusal(precision):
            note(name, precision, 0, reason)
            wanted.remove((name, precision))
    for compression, group in itertools.product(compressions, groups):
        case = InferenceCase(model, compression, group, image_size)
        with _networks(case) as networks, _threads(threads):
            for batch in batches:
                times = _times(networks, batch, threads, wanted, (rounds, seconds), progress, note)
                rows += _rows(case, batch, threads, times)
    return rows, list(missing.values())


def _times(
    networks: Networks,
    batch: int,
    threads: int,
    wanted: Sequence[tuple[str, str]],
    rounds: tuple[int, float],
    progress: Progress,
    note: Any,
) -> _Times:
    x = networks.case.images(batch)
    exact = networks.exact(x)
    scale = float(exact.abs().max())
    calls: dict[tuple[str, str], Call] = {}
    errors: dict[tuple[str, str], float] = {}
    what = f"{networks.case.compression:g}x, batch {batch}, {threads} thread{'s' * (threads > 1)}"
    for name, precision in wanted:
        progress(f"{what}: preparing {name} in {precision}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other packages about themselves
                call = ENGINES[name].make(networks, x, threads, precision)
                call()
                error = float((read(call()) - exact).abs().max()) / scale
            if not error <= TOLERANCE[precision]:
                raise WrongResultError(f"its outputs are off by {error:.2g} of the largest")
        except Exception as failure:  # of engines that are not ours: the others go on
            first = str(failure).strip().split("\n")[0]
            note(name, precision, batch, f"{type(failure).__name__}: {first}")
            continue
        calls[name, precision], errors[name, precision] = call, error
    progress(f"{what}: timing")
    if not calls:
        return {}
    most, seconds = rounds
    ms = timed_for(calls, seconds, (min(LEAST_ROUNDS, most), most), repeat=max(1, FULL // batch))
    torch.compiler.reset()
    return {key: (ms[key], errors[key]) for key in calls}


def _rows(case: InferenceCase, batch: int, threads: int, times: _Times) -> list[InferenceRow]:
    medians = {key: statistics.median(ms) for key, (ms, _) in times.items()}
    rows = []
    for (name, precision), (measured, error) in times.items():
        ms = medians[name, precision]
        others = [
            other_ms
            for (other, same), other_ms in medians.items()
            if same == precision and not ENGINES[other].sparse
        ]
        ratio = min(others) / ms if others and ENGINES[name].sparse else None
        row = InferenceRow(
            case.model, case.compression, case.group, batch, threads, name, precision, ms, error, ratio,
            len(measured),
        )  # fmt: skip
        rows.append(row)
    return rows


def _check(name: str, given: Sequence[str], known: Any) -> None:
    wrong = [one for one in given if one not in known]
    if wrong or not given:
        raise UserError(f"{name} is one or more of {', '.join(known)}, not {', '.join(wrong) or 'nothing'}")


@contextmanager
def _networks(case: InferenceCase) -> Iterator[Networks]:
    """The network; the files that engines have written are removed afterwards."""
    networks = case.networks()
    try:
        yield networks
    finally:
        for path in networks.files.values():
            shutil.rmtree(path.parent, ignore_errors=True)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
