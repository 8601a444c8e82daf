"""Networks of finished runs beside their dense ones: inference and a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from clicktrain.accounting import ModelCost, count
from clicktrain.bench.step import TrainingStep, accelerated
from clicktrain.bench.timing import (
    Progress,
    WrongResultError,
    autocast,
    channels_last,
    check_rounds,
    fastest,
    median_ms,
)
from clicktrain.bench.timing import to_json as to_json
from clicktrain.compiler import Accelerated
from clicktrain.errors import UserError
from clicktrain.formats.memory_format import unsafe_in_channels_last
from clicktrain.kernels.native import keep_memory
from clicktrain.kernels.pack_model import pack_model_
from clicktrain.sparsity.masks import conv_masks
from clicktrain.train import load_run
from clicktrain.train.restore import LoadedRun

TOLERANCE = 1e-3
"""Allowed difference of logits between the run's network and what is timed, relative to the largest."""
LAYOUTS = ("NCHW", "channels_last")


@dataclass(frozen=True, slots=True)
class RunRow:
    """One network doing one thing.

    Attributes:
        run: its folder.
        what: ``inference``, or ``training step`` (forward, loss, backward, SGD with momentum).
        dense_ms, dense_name: of the dense network, in the fastest memory order and precision that was tried
            (`safe_layouts`).
        pruned_ms, pruned_name: of the run's network, likewise, or accelerated.
        flops_ratio: FLOPs of the pruned network over those of the dense one, for the same thing.
        share_of_saving: time saved over FLOPs saved; 1 = time fell as FLOPs did, None if no FLOPs were saved.
    """

    run: str
    method: str
    what: str
    batch_size: int
    dense_ms: float
    dense_name: str
    pruned_ms: float
    pruned_name: str
    ratio: float
    flops_ratio: float
    share_of_saving: float | None


def bench_runs(
    paths: Sequence[str],
    *,
    batch_sizes: Sequence[int] = (64,),
    rounds: int = 7,
    bf16: bool = False,
    model: str | None = None,
    progress: Progress = lambda text: None,
) -> list[RunRow]:
    """Time the networks of finished runs; all that is compared is interleaved in one process.

    Medians are taken of ``rounds`` timings. ``bf16`` also tries everything dense under bfloat16 autocast;
    ``model`` is package.module:factory, for runs of a network of one's own.

    Raises:
        UserError: no such run, or a number out of range.
        WrongResultError: an accelerated network does not compute what the run's does.
    """
    check_rounds(rounds)
    if not paths:
        raise UserError("there is nothing to measure: name finished runs, as in --runs runs/A runs/B")
    if not batch_sizes or min(batch_sizes) < 1:
        raise UserError(f"batch_size must be at least 1, not {min(batch_sizes, default=0)}")
    keep_memory()
    rows = []
    for path in paths:
        loaded = load_run(path, model)
        for batch in batch_sizes:
            for what in ("inference", "training step"):
                progress(f"{path}: {what}, batch {batch}")
                rows.append(_row(Path(path), loaded, what, batch, rounds, bf16))
    return rows


def _row(path: Path, loaded: LoadedRun, what: str, batch: int, rounds: int, bf16: bool) -> RunRow:
    x, y = random_batch(loaded, batch)
    dense, pruned = loaded.dense_model(), loaded.model
    training = what == "training step"
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for kind, model in (("dense", dense), ("pruned", pruned)):
        for layout in safe_layouts(model) if training else LAYOUTS:
            for half in (False, True) if bf16 else (False,):
                name = f"{layout} bf16" if half else layout
                calls[kind, name] = network_call(copy.deepcopy(model), x, y, layout, half, training)
    if (fast := _accelerated(loaded, x)) is not None:
        calls["pruned", "accelerated"] = network_call(fast, x, y, "NCHW", False, training)
    times = median_ms(calls, rounds, warmup=2)
    name, slow = fastest({name: ms for (kind, name), ms in times.items() if kind == "dense"})
    own, quick = fastest({name: ms for (kind, name), ms in times.items() if kind == "pruned"})
    costs = count(pruned, x[:1], loaded.masks), count(dense, x[:1], {})
    flops = _flops(costs[0], training) / max(_flops(costs[1], training), 1)
    return RunRow(
        str(path), loaded.config.method, what, batch, slow, name, quick, own, slow / quick, flops,
        (1 - quick / slow) / (1 - flops) if flops < 1 else None,
    )  # fmt: skip


def random_batch(loaded: LoadedRun, size: int) -> tuple[Tensor, Tensor]:
    """Images and labels of the run's shapes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, *loaded.image_shape, generator=generator)
    return x, torch.randint(loaded.facts["num_classes"], (size,), generator=generator)


def safe_layouts(model: nn.Module) -> tuple[str, ...]:
    """Memory orders that a network can be trained in as a whole on a CPU: see `memory_format`."""
    unsafe = any(unsafe_in_channels_last(module) for module in model.modules())
    return tuple(layout for layout in LAYOUTS if layout != "channels_last") if unsafe else LAYOUTS


def _flops(cost: ModelCost, training: bool) -> int:
    return cost.training_flops if training else cost.forward_flops


def _accelerated(loaded: LoadedRun, x: Tensor) -> nn.Module | None:
    """On the sparse kernels, where there is something sparse; checked against the run's own network."""
    masks = conv_masks(loaded.masks)
    if not masks:
        return None
    packed = copy.deepcopy(loaded.model)
    pack_model_(packed, masks)
    fast = accelerated(packed, x)
    if not isinstance(fast, Accelerated) or not fast.active:
        return None
    with torch.inference_mode():
        expected, result = loaded.model.eval()(x), fast.eval()(x)
    if not bool((result - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp_min(1)):
        raise WrongResultError(f"the accelerated network of {loaded.folder.path} computes something else")
    return fast


def network_call(
    model: nn.Module, x: Tensor, y: Tensor, layout: str, half: bool, training: bool
) -> Callable[[], object]:
    """A network's training step, or its inference, in a memory order; ``half``: under bfloat16 autocast."""
    if layout == "channels_last":
        model, x = channels_last(model, x)
    if training:
        return TrainingStep(model.train(), x, y, bf16=half)
    model.eval()

    def predict() -> None:
        with torch.inference_mode(), autocast(half):
            model(x)

    return predict
