"""Widths that a device runs well: what rounding channel counts brings, by measurement.

After channels have gone a layer has any number of them, 23 say. Vector lanes and tensor cores work in blocks:
on some devices 24 channels are faster than 23, on others only as slow. ``round_to`` keeps a few dead channels
so that widths are multiples; whether that pays is measured here, once per device and kind of layer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.surgery.graph import trace

FORMAT_VERSION = 1
MULTIPLES = (1, 2, 4, 8, 16, 32)
"""What widths may be rounded to."""
SMALLEST, LARGEST = 8, 64
"""Widths that are measured, all of them; the largest is a multiple of every candidate."""
CPU_BATCH = 16
"""Images at most on a CPU, where time is proportional to them from a few on."""
SECONDS = 20.0
"""After that long a measurement ends with the round that it is in, the third at the earliest."""
WORTH = 0.03
"""Share of the time that a larger multiple has to save: measurements repeat to about that."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A convolution with batch norm and ReLU, as many filters as channels.

    Attributes:
        kernel, stride: of the convolution, padded to keep the size.
        size: height and width of what it reads.
        batch: images.
        dtype: ``float32``, or what autocast computes in: ``bfloat16``, ``float16``.
        channels_last: memory order.
    """

    kernel: int = 3
    stride: int = 1
    size: tuple[int, int] = (16, 16)
    batch: int = 64
    dtype: str = "float32"
    channels_last: bool = False


@dataclass(frozen=True, slots=True)
class Rounding:
    """Rounding all widths up to a multiple: mean milliseconds, and channels kept for it (share of all)."""

    multiple: int
    ms: float
    extra_channels: float


@dataclass(frozen=True, slots=True)
class WidthTable:
    """What was measured. ``str(table)`` shows what each multiple brings and costs.

    Attributes:
        device: its name.
        layer: what was measured.
        widths, ms: channels, and median milliseconds of a forward and backward pass.
        roundings: what follows for each candidate, over all widths alike.
        chosen: the multiple that pays.
    """

    device: str
    layer: LayerShape
    widths: tuple[int, ...]
    ms: tuple[float, ...]
    roundings: tuple[Rounding, ...]
    chosen: int

    def __str__(self) -> str:
        lines = ["multiple  time of a step  extra channels"]
        first = self.roundings[0].ms
        for row in self.roundings:
            mark = "  <- chosen" if row.multiple == self.chosen else ""
            lines.append(f"{row.multiple:8d}  {row.ms / first:13.1%}  {row.extra_channels:14.1%}{mark}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, numbers and strings for `json.dumps`."""
        return {"version": FORMAT_VERSION, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> WidthTable:
        """Inverse of `to_json`; UserError if the document is no such table, or of another version."""
        try:
            if document["version"] != FORMAT_VERSION:
                raise UserError(f"the table of widths has format version {document['version']}")
            layer = dict(document["layer"])
            return cls(
                str(document["device"]),
                LayerShape(**{**layer, "size": tuple(layer["size"])}),
                tuple(int(width) for width in document["widths"]),
                tuple(float(ms) for ms in document["ms"]),
                tuple(Rounding(**row) for row in document["roundings"]),
                int(document["chosen"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"this is no table of widths: {type(error).__name__} {error}") from None


def measured_round_to(
    device: torch.device | str,
    layer: LayerShape | None = None,
    *,
    rounds: int = 5,
    folder: Path | None = None,
) -> tuple[int, WidthTable]:
    """The multiple that channel counts are best rounded up to on a device, and what was measured.

    All widths from 8 to 64 are timed, interleaved; a multiple is worth its extra channels if a step, averaged
    over all widths that pruning may leave, becomes at least 3% faster than with the best smaller choice.
    Where widths between multiples are only as slow as the multiple above them, that is 1: nothing is gained.

    The table is kept on disk: a device and layer are measured once, so that two runs decide alike. Measuring
    takes about `SECONDS`; on a CPU, batches of at most `CPU_BATCH` images are timed.

    Args:
        device: to measure on.
        layer: what to measure, see `typical_layer`; an ordinary 3x3 convolution by default.
        rounds: how many times each width is timed, if there is time.
        folder: where tables are kept; ``clicktrain/widths`` in the user's cache by default.

    Raises:
        UserError: there are no rounds, or the device cannot compute in the layer's dtype.
    """
    if rounds < 1:
        raise UserError(f"rounds must be at least 1, not {rounds}")
    device, layer = torch.device(device), layer or LayerShape()
    if device.type == "cpu":
        layer = dataclasses.replace(layer, batch=min(layer.batch, CPU_BATCH))
    path = _place(device, layer, folder or _cache_folder())
    table = _read(path)
    if table is None:
        widths = tuple(range(SMALLEST, LARGEST + 1))
        ms = time_widths(device, layer, widths, rounds)
        roundings = rounding_times(dict(zip(widths, ms, strict=True)))
        table = WidthTable(_device_name(device), layer, widths, tuple(ms), roundings, best(roundings))
        _keep(path, table)
    return table.chosen, table


def rounding_times(ms: Mapping[int, float], multiples: Sequence[int] = MULTIPLES) -> tuple[Rounding, ...]:
    """Mean time and extra channels of each multiple, if pruning leaves every measured width alike often.

    Args:
        ms: width -> milliseconds, for all widths up to a multiple of every candidate.
        multiples: the candidates.
    """
    found = []
    for multiple in multiples:
        rounded = [-(-width // multiple) * multiple for width in ms]
        found.append(
            Rounding(
                multiple,
                statistics.fmean(ms[width] for width in rounded),
                sum(rounded) / sum(ms) - 1,
            )
        )
    return tuple(found)


def best(roundings: Sequence[Rounding], worth: float = WORTH) -> int:
    """The multiple that pays: each larger one has to be faster than the best smaller one by ``worth``."""
    chosen = roundings[0]
    for row in roundings[1:]:
        if row.ms < (1 - worth) * chosen.ms:
            chosen = row
    return chosen.multiple


def typical_layer(
    model: nn.Module,
    example: Tensor,
    *,
    batch: int = 64,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> LayerShape:
    """The ordinary convolution that a network computes most in: its kernel, stride and size.

    Args:
        model: any module that torch.fx can trace.
        example: its input, [N, C, H, W].
        batch: images of a training step.
        dtype: what autocast computes in, or float32.
        channels_last: memory order of the run.

    Returns:
        `LayerShape`'s own 3x3 convolution if the network has no ordinary 2-D convolution.
    """
    graph = trace(model, example)
    work: dict[LayerShape, int] = {}
    common: dict[str, Any] = {"batch": batch, "dtype": str(dtype).removeprefix("torch."),
                              "channels_last": channels_last}  # fmt: skip
    for node in graph.nodes:
        module = graph.module(node) if node.op == "call_module" else None
        if not isinstance(module, nn.Conv2d) or module.groups > 1 or module.in_channels <= 4:
            continue
        source, target = node.all_input_nodes[0], graph.shapes[node]
        height, width = graph.shapes[source][-2:]
        shape = LayerShape(int(module.kernel_size[0]), int(module.stride[0]), (height, width), **common)
        flops = module.weight.numel() * target[-1] * target[-2]
        work[shape] = work.get(shape, 0) + flops
    return max(work, key=lambda shape: work[shape]) if work else LayerShape(**common)


def time_widths(device: torch.device, layer: LayerShape, widths: Sequence[int], rounds: int) -> list[float]:
    """Median milliseconds of a training step of the layer with each number of channels.

    Where one thread does the work it is that thread's time on the processor: other programs do not count.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    steps: dict[int, Callable[[], None]] = {}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), torch.inference_mode(False):
        for width in widths:
            steps[width] = _step(device, layer, width)
        times: dict[int, list[float]] = {width: [] for width in widths}
        order, shuffle = list(widths), random.Random(0).shuffle
        begun = time.perf_counter()
        for number in range(rounds + 1):  # the first one warms up
            if number > 2 and time.perf_counter() - begun > SECONDS:
                break
            shuffle(order)
            for width in order:
                _wait(device)
                started = clock()
                steps[width]()
                _wait(device)
                if number:
                    times[width].append(1000 * (clock() - started))
    return [statistics.median(times[width]) for width in widths]


def _step(device: torch.device, layer: LayerShape, width: int) -> Callable[[], None]:
    dtype = getattr(torch, layer.dtype)
    conv = nn.Conv2d(width, width, layer.kernel, layer.stride, layer.kernel // 2, bias=False)
    net: nn.Module = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()).to(device)
    x = torch.randn(layer.batch, width, *layer.size, device=device)
    if layer.channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    needed = [x, *net.parameters()]

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            y = net(x)
        torch.autograd.grad(y, needed, torch.ones_like(y))

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        found = next(line for line in text.splitlines() if line.startswith("model name"))
        return found.partition(":")[2].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "clicktrain" / "widths"


def _place(device: torch.device, layer: LayerShape, folder: Path) -> Path:
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    about = [
        FORMAT_VERSION,
        device.type,
        _device_name(device),
        torch.__version__,
        threads,
        dataclasses.astuple(layer),
    ]
    return folder / f"widths-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]}.json"


def _read(path: Path) -> WidthTable | None:
    try:
        return WidthTable.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, UserError):
        return None


def _keep(path: Path, table: WidthTable) -> None:
    """Write it down; a full disk only means that the next run measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps(table.to_json()))
    except OSError:
        path.unlink(missing_ok=True)
