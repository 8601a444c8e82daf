"""On a GPU: whole training steps, passes of batch norms, conversion to packed weights, a pair of short runs.

All of it also runs dry, on the CPU: everything is built and checked on the smallest networks, and nothing is
timed. What a dry row has no figure for is None.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clicktrain.bench.conv import Shape
from clicktrain.bench.gpu import dry_device, graph_ms, need_gpu
from clicktrain.bench.masks import pattern_mask
from clicktrain.bench.timing import WrongResultError
from clicktrain.compiler import Accelerated, RecordedStep, accelerate
from clicktrain.formats.packed import Structure, pack_values
from clicktrain.kernels.batch_norm2d.layer import uses_batch_statistics
from clicktrain.kernels.innermost_layout import batch_norm_innermost
from clicktrain.kernels.pack_model import pack_model_, pack_refusals
from clicktrain.latency.timer import candidates_ms
from clicktrain.models import create_model
from clicktrain.runs.folder import RunFolder
from clicktrain.train import from_dict
from clicktrain.train.fit import fit

CLASSES = 10
SECONDS = 4.0
"""For the steps of one network together."""
_NEAR = 0.1
"""Largest error of the whole gradient over its length, in bfloat16: what is wrong is off by far more."""


def _device(dry: bool) -> torch.device:
    return dry_device() if dry else need_gpu()


# ---------------------------------------------------------------- training steps


@dataclass(frozen=True, slots=True)
class GpuStep:
    """A network of the zoo and its batch; ``filters`` and ``channels`` share kernels, as of `GpuCase`."""

    model: str
    batch: int
    image: int
    compression: float
    filters: int
    channels: int = 1
    width: float = 1.0

    def name(self) -> str:
        """For files and messages."""
        return (
            f"{self.model}-n{self.batch}-{self.image}px-{self.compression:g}x-{self.filters}x{self.channels}"
        )


def shared_masks(model: nn.Module, case: GpuStep) -> dict[str, Tensor]:
    """Random masks of every convolution but the first, by layer name; True = kept."""
    generator = torch.Generator().manual_seed(0)
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    names = [name for name in list(convolutions)[1:] if convolutions[name].groups == 1]
    refused = pack_refusals(model, names)
    masks = {}
    for name in names:
        f, c, r, s = convolutions[name].weight.shape
        block = math.gcd(c, case.channels)
        if name not in refused:
            mask = pattern_mask((f, c // block, r, s), case.compression, case.filters, generator)
            masks[name] = mask.repeat_interleave(block, 1)
    return masks


class _Step:
    """Forward, loss, backward and SGD with momentum on one batch."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, bf16: bool, recorded: bool) -> None:
        self.model, self.x, self.y = model, x, y
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self._cast = (x.device.type, torch.bfloat16, bf16)
        self._recorded = RecordedStep(self.loss, model) if recorded else None

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean over the batch."""
        kind, dtype, enabled = self._cast
        with torch.autocast(kind, dtype, enabled=enabled):
            return F.cross_entropy(self.model(x).float(), y)

    def __call__(self) -> None:
        """One step; a recorded one is checked to be one by `why_not`."""
        if self._recorded is None:
            self.loss(self.x, self.y).backward()  # type: ignore[no-untyped-call]
        else:
            self._recorded(self.x, self.y)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def why_not(self) -> str | None:
        """Why a step that was to be recorded is not."""
        return None if self._recorded is None else self._recorded.reason


def bench_gpu_step(case: GpuStep, *, dry: bool = False) -> list[dict[str, Any]]:
    """Time training steps in bfloat16: dense ones, also compiled and recorded, and accelerated ones.

    The accelerated network's loss and gradients are compared with the packed one's in float32 first.

    Returns:
        One row: milliseconds by name of the step, and ``failed`` with why one is not there.

    Raises:
        WrongResultError: the accelerated network computes something else.
    """
    device = _device(dry)
    torch.manual_seed(0)
    stem = "cifar" if case.image <= 64 else "imagenet"
    dense = create_model(case.model, num_classes=CLASSES, stem=stem, width=case.width)
    packed = copy.deepcopy(dense)
    pack_model_(packed, shared_masks(packed, case))
    dense, packed = dense.to(device).train(), packed.to(device).train()
    x = torch.randn(case.batch, 3, case.image, case.image, device=device)
    y = torch.randint(CLASSES, (case.batch,), device=device)
    rule, dtypes = ("sparse", ("fp32",)) if dry else ("measured", ("fp32", "bf16"))
    fast = accelerate(copy.deepcopy(packed), x, rule=rule, dtypes=dtypes, remember=False)
    error = gradient_error(packed, fast, x, y, bf16=not dry)
    if not error <= _NEAR:
        raise WrongResultError(f"{case.name()}: the accelerated gradient is off by {error:.2g} of its length")
    last, bf16 = x.to(memory_format=torch.channels_last), not dry
    channels_last = copy.deepcopy(dense).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = {
        "dense": _Step(copy.deepcopy(channels_last), last, y, bf16, recorded=False),
        "dense recorded": _Step(copy.deepcopy(channels_last), last, y, bf16, recorded=True),
        "sparse": _Step(fast, x, y, bf16, recorded=False),
    }
    recorded = accelerate(copy.deepcopy(packed), x, plan=fast.plan) if fast.active else fast
    steps["sparse recorded"] = _Step(recorded, x, y, bf16, recorded=True)
    failed: dict[str, str] = {}
    if not dry:
        channels_last.compile(dynamic=False)
        steps["dense compiled"] = _Step(channels_last, last, y, bf16, recorded=False)
    for name, step in list(steps.items()):
        try:
            for _ in range(3):
                step()
        except Exception as problem:  # torch.compile wants tools that may not be there
            failed[name] = f"{type(problem).__name__}: {str(problem).strip().splitlines()[:1]}"
            del steps[name]
            continue
        if step.why_not is not None:
            failed[name] = step.why_not
            if not dry:
                del steps[name]
    ms = {} if dry else candidates_ms(steps, SECONDS, rounds=(5, 30), device=device)
    plan = fast.plan.operators() if isinstance(fast, Accelerated) else {}
    best_dense = min((value for name, value in ms.items() if name.startswith("dense")), default=None)
    best_sparse = min((value for name, value in ms.items() if name.startswith("sparse")), default=None)
    ratio = best_dense / best_sparse if best_dense and best_sparse else None
    return [
        {
            "case": asdict(case), "ms": ms, "ratio": ratio, "gradient_error": error, "operators": plan,
            "failed": failed, "dry": dry,
        }
    ]  # fmt: skip


def gradient_error(reference: nn.Module, fast: nn.Module, x: Tensor, y: Tensor, bf16: bool) -> float:
    """Error over length of all gradients together, of ``fast`` under autocast against float32."""
    joined = []
    for model, cast in ((reference, False), (fast, bf16)):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=cast):
            loss = F.cross_entropy(model(x).float(), y)
        parameters = [one for one in model.parameters() if one.requires_grad]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        joined.append(torch.cat([one.double().flatten() for one in gradients if one is not None]))
    return float((joined[1] - joined[0]).norm() / joined[0].norm())


# ---------------------------------------------------------------- batch norm


def bench_norm(shape: Shape, *, dry: bool = False) -> list[dict[str, Any]]:
    """Time batch norm + addition + ReLU in training, forward and backward, in bfloat16.

    ``kernels`` are Triton's and ``pytorch`` PyTorch's operators in the batch-innermost layout,
    ``channels_last`` PyTorch's in the layout of dense networks. Results are compared with float64 first.

    Raises:
        WrongResultError: a result is off.
    """
    device = _device(dry)
    torch.manual_seed(0)
    sizes = shape.batch, shape.channels, shape.height, shape.width
    x, added, gy = (torch.randn(sizes, device=device).bfloat16() for _ in range(3))
    norm = nn.BatchNorm2d(shape.channels, track_running_stats=False).to(device)
    assert uses_batch_statistics(norm)
    expected = (copy.deepcopy(norm).double()(x.double()) + added.double()).relu().detach()

    def innermost(images: Tensor) -> Tensor:
        return images.permute(1, 2, 3, 0).contiguous()

    def in_layout(one: Tensor, other: Tensor) -> Tensor:
        return batch_norm_innermost(one, norm, shape.batch, other, "relu")

    def by_pytorch(one: Tensor, other: Tensor) -> Tensor:
        flat = one.view(1, one.shape[0], -1, shape.batch)
        return torch.relu(norm(flat).view_as(one) + other)

    def dense(one: Tensor, other: Tensor) -> Tensor:
        return torch.relu(norm(one) + other)

    calls: dict[str, Callable[[], object]] = {}
    for name, run, convert in (
        ("kernels", in_layout, innermost),
        ("pytorch", by_pytorch, innermost),
        ("channels_last", dense, lambda t: t.contiguous(memory_format=torch.channels_last)),
    ):
        inputs = [convert(t).requires_grad_() for t in (x, added)]
        grad = convert(gy)

        def call(run: Any = run, inputs: list[Tensor] = inputs, grad: Tensor = grad) -> object:
            return torch.autograd.grad(run(*inputs), [*inputs, *norm.parameters()], grad)

        result = run(*inputs).detach()
        result = result if convert is not innermost else result.permute(3, 0, 1, 2)
        error = float((result.double() - expected).abs().max() / expected.abs().max())
        if not error <= 2e-2:
            raise WrongResultError(f"batch norm, {name}: off by {error:.2g} of the largest value")
        calls[name] = call
    for one in calls.values():
        one()
    ms = {} if dry else graph_ms(calls)
    ratio = min(ms["pytorch"], ms["channels_last"]) / ms["kernels"] if ms else None
    return [{"case": asdict(shape), "ms": ms, "ratio": ratio, "dry": dry}]


# ---------------------------------------------------------------- conversion


def bench_conversion(filters: int, channels: int, *, dry: bool = False) -> list[dict[str, Any]]:
    """Time the way from a dense weight to its kept values, beside PyTorch's conversion to CSR (figure 9).

    Raises:
        WrongResultError: they do not give the same values.
    """
    device = _device(dry)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return [_conversion(filters, channels, compression, device, dry) for compression in (4.0, 10.0)]


def _conversion(
    filters: int, channels: int, compression: float, device: torch.device, dry: bool
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    mask = pattern_mask((filters, channels, 3, 3), compression, 1, generator)
    # No kept value may be zero by chance: the conversion to CSR would drop it.
    weight = ((torch.rand(mask.shape, generator=generator) + 0.5) * mask).to(device)
    structure, kept = Structure.from_mask(mask).to(device), mask.to(device)
    flat = weight.view(filters, -1)
    calls: dict[str, Callable[[], object]] = {
        "pack": lambda: pack_values(structure, weight),
        "masked_select": lambda: torch.masked_select(weight, kept),
        "csr": lambda: flat.to_sparse_csr(),
    }
    packed = pack_values(structure, weight).flatten()
    if not torch.equal(packed, flat.to_sparse_csr().values()) or not torch.equal(packed, weight[kept]):
        raise WrongResultError("packed values are not those of the CSR matrix")
    ms = {} if dry else candidates_ms(calls, 1.0, rounds=(20, 200), device=device)
    case = {"filters": filters, "channels": channels, "compression": compression}
    ratio = ms["csr"] / ms["pack"] if ms else None
    return {"case": case, "density": structure.density, "ms": ms, "ratio": ratio, "dry": dry}


# ---------------------------------------------------------------- accuracy


def short_run(
    recipe: dict[str, Any], folder: Path, out_of_time: Callable[[], bool], *, dry: bool = False
) -> list[dict[str, Any]]:
    """Train by a recipe in a folder, or go on there; accuracy and seconds. A dry run keeps neither.

    ``out_of_time`` is asked before it begins; a run that was killed goes on where its checkpoint is.
    """
    device = _device(dry)
    if out_of_time():
        return []
    config, method = from_dict({**recipe, "device": device.type})
    summary = fit(config, method, RunFolder(folder), resume="if begun")
    keys = ("val_accuracy", "seconds", "train_flops_ratio", "density")
    return [{"case": recipe, "dry": dry, **{key: None if dry else summary.get(key) for key in keys}}]
