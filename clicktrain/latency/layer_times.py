"""Measured times of dense layers over channel counts, on the user's own device (When to Prune?, section 4.3).

A table is built once for a layer's geometry and kept on disk; between its points times are interpolated.
Measured times are not monotone: some widths suit the vector units, and every clock is noisy. The table is:
each point is the mean of the largest time of any smaller layer and the smallest of any larger one. So fewer
channels never cost more, which a ranking by the time that a removal saves relies on.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.comm.agreement import agreed
from clicktrain.errors import UserError
from clicktrain.formats.atomic import write_text_atomic
from clicktrain.latency.timer import least_ms

FORMAT_VERSION = 1
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Channel counts that are measured along each axis, as shares of the whole layer."""
ROUNDS = 7


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """All that the time of a dense 2-D convolution or linear layer depends on.

    Attributes:
        inputs, outputs: channels of the whole layer.
        kernel, stride, padding, dilation: of a convolution; empty for a linear layer.
        groups: of a convolution; 0 stands for depthwise, where inputs and outputs are one number.
        input_hw: pixels of what it reads.
        inputs_vary, outputs_vary: whether channels can go on that side.
    """

    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    input_hw: tuple[int, ...] = ()
    inputs_vary: bool = True
    outputs_vary: bool = True

    def points(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The counts of inputs and of outputs that are measured, ascending."""
        step = max(self.groups, 1)
        rows = _counts(self.inputs, step) if self.inputs_vary and self.groups else (self.inputs,)
        columns = _counts(self.outputs, step) if self.outputs_vary else (self.outputs,)
        return rows, columns

    def call(self, inputs: int, outputs: int, batch: int, device: torch.device) -> Callable[[], object]:
        """The layer with so many channels, on random numbers."""
        generator = torch.Generator().manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).to(device)

        if not self.kernel:
            x, weight = random(batch, *self.input_hw, inputs), random(outputs, inputs)
            return lambda: F.linear(x, weight)
        groups = self.groups or outputs
        inputs = inputs if self.groups else outputs
        x = random(batch, inputs, *self.input_hw)
        weight = random(outputs, inputs // groups, *self.kernel)
        return lambda: F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, groups)


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Milliseconds of one layer over its channel counts.

    Attributes:
        inputs, outputs: the measured counts, ascending.
        ms: [len(inputs)][len(outputs)], monotone along both.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]

    def at(self, inputs: int, outputs: int) -> float:
        """Bilinear between measured counts, the nearest of them outside; monotone in both.

        Example:
            >>> LayerTimes((2, 4), (1,), ((1.0,), (3.0,))).at(3, 1)
            2.0
        """
        row, right = _place(self.inputs, inputs)
        column, down = _place(self.outputs, outputs)
        next_column = min(column + 1, len(self.outputs) - 1)
        lower, upper = (
            times[column] + down * (times[next_column] - times[column])
            for times in (self.ms[row], self.ms[min(row + 1, len(self.inputs) - 1)])
        )
        return lower + right * (upper - lower)

    @classmethod
    def of(
        cls, inputs: Sequence[int], outputs: Sequence[int], measured: Mapping[tuple[int, int], float]
    ) -> LayerTimes:
        """Monotone times from measured ones, (inputs, outputs) -> milliseconds."""
        grid = torch.tensor([[measured[i, o] for o in outputs] for i in inputs], dtype=torch.float64)
        below = grid.cummax(dim=0).values.cummax(dim=1).values
        above = grid.flip(0, 1).cummin(dim=0).values.cummin(dim=1).values.flip(0, 1)
        ms = ((below + above) / 2).tolist()
        return cls(tuple(inputs), tuple(outputs), tuple(map(tuple, ms)))


def layer_times(
    geometries: Iterable[LayerGeometry],
    batch: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[LayerGeometry, LayerTimes]:
    """Times of layers in inference, from the cache or measured now.

    Args:
        geometries: layers; equal ones are measured once.
        batch: images.
        device: where they run; on CPUs with the threads of this process.
        progress: told what is being measured.

    Raises:
        UserError: the batch is empty.
    """
    if batch < 1:
        raise UserError(f"a batch has at least 1 image, not {batch}")
    found: dict[LayerGeometry, LayerTimes] = {}
    for geometry in dict.fromkeys(geometries):
        path = _cache_path(geometry, batch, device)
        times = _read(path, geometry)
        if times is None:
            progress(f"measuring a layer of {geometry.inputs} -> {geometry.outputs} channels, batch {batch}")
            times = measure_layer(geometry, batch, device)
            keep_json(path, asdict(times))
        columns = len(times.outputs)
        ms = agreed([ms for row in times.ms for ms in row], device)
        rows = tuple(tuple(ms[first : first + columns]) for first in range(0, len(ms), columns))
        found[geometry] = replace(times, ms=rows)
    return found


def measure_layer(geometry: LayerGeometry, batch: int, device: torch.device) -> LayerTimes:
    """Time a layer at all its points."""
    inputs, outputs = geometry.points()
    calls = {
        (i, o): synchronised(geometry.call(i, o, batch, device), device) for i in inputs for o in outputs
    }
    with torch.inference_mode():
        return LayerTimes.of(inputs, outputs, least_ms(calls, ROUNDS, clock=clock_of(device)))


def clock_of(device: torch.device) -> Callable[[], float]:
    """What latencies are measured with.

    Where one thread does the work, its time on the processor: what other programs take is not the network's.
    Else the wall clock.
    """
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def synchronised(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A call that returns when the device has done it."""
    if device.type != "cuda":
        return call

    def wait() -> None:
        call()
        torch.cuda.synchronize(device)

    return wait


def _counts(channels: int, step: int) -> tuple[int, ...]:
    counts = {max(step, round(share * channels / step) * step) for share in SHARES}
    return tuple(sorted(counts))


def _place(points: Sequence[int], count: int) -> tuple[int, float]:
    """Index of the point at or below a count, and how far it is towards the next."""
    index = bisect.bisect_right(points, count) - 1
    if index < 0 or index == len(points) - 1:
        return max(index, 0), 0.0
    return index, (count - points[index]) / (points[index + 1] - points[index])


# ---------------------------------------------------------------- on disk


def cache_folder() -> Path:
    """``$CLICKTRAIN_LATENCY_CACHE``, else ``clicktrain/latency`` in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("CLICKTRAIN_LATENCY_CACHE") or Path(home) / "clicktrain" / "latency")


def _cache_path(geometry: LayerGeometry, batch: int, device: torch.device) -> Path:
    text = json.dumps([FORMAT_VERSION, machine(device), torch.__version__, batch, asdict(geometry)])
    return cache_folder() / f"layer-{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def machine(device: torch.device) -> list[object]:
    """What times depend on beside the work: the processor or GPU, and the threads."""
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device), torch.version.cuda]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        cpu = ""
    return [device.type, cpu or platform.processor(), platform.machine(), torch.get_num_threads()]


def _read(path: Path, geometry: LayerGeometry) -> LayerTimes | None:
    """A table that is kept there; one that cannot be read, or has other points, is measured anew."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        inputs, outputs = (tuple(map(int, document[key])) for key in ("inputs", "outputs"))
        ms = tuple(tuple(map(float, row)) for row in document["ms"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    fits = (inputs, outputs) == geometry.points() and [len(row) for row in ms] == [len(outputs)] * len(inputs)
    return LayerTimes(inputs, outputs, ms) if fits else None


def keep_json(path: Path, document: Mapping[str, object]) -> None:
    """Write a measurement down; where that is not possible the next run measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps(document))
    except (OSError, UserError):
        return
