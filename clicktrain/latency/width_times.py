"""Measured times of dense layers over channel counts, on the user's own device (When to Prune?, section 4.3).

A table is measured once per layer geometry and kept on disk; between its points times are interpolated.
Measured times are not monotone: some widths suit the vector units, and every clock is noisy. The table is
monotone: each point is the mean of the largest time of any smaller layer and the smallest of any larger one.
So fewer channels never cost more, which a ranking by saved time relies on.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clicktrain.comm.agreement import agreed
from clicktrain.errors import UserError
from clicktrain.latency.machine import measured_once
from clicktrain.latency.timer import clock_of, interleaved_ms, synchronized

FORMAT_VERSION = 2
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)
"""Channel counts that are measured along each axis, as shares of the whole layer."""
ROUNDS = 7


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """What the time of a dense 2-D convolution, or linear layer (``kernel`` is empty), depends on.

    ``groups`` 0 means depthwise, where inputs and outputs are the same channels. ``inputs_vary`` and
    ``outputs_vary`` say whether channels can be removed on that side.
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

    def read(self, document: Mapping[str, Any]) -> WidthTimes | None:
        """Times from disk; None where they are of other points."""
        inputs, outputs = (tuple(map(int, document[key])) for key in ("inputs", "outputs"))
        ms = tuple(tuple(map(float, row)) for row in document["ms"])
        fits = (inputs, outputs) == self.points() and [len(row) for row in ms] == [len(outputs)] * len(inputs)
        return WidthTimes(inputs, outputs, ms) if fits else None

    def call(self, inputs: int, outputs: int, batch: int, device: torch.device) -> Callable[[], object]:
        """A call of the layer with these channel counts on random numbers."""
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
class WidthTimes:
    """Milliseconds [len(inputs)][len(outputs)] of one layer over channel counts, ascending and monotone."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]

    def at(self, inputs: int, outputs: int) -> float:
        """Milliseconds with these counts: bilinear between measured ones, constant outside; monotone in both.

        Examples:
            >>> WidthTimes((2, 4), (1,), ((1.0,), (3.0,))).at(3, 1)
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
    ) -> WidthTimes:
        """Monotone times from measured ones, (inputs, outputs) -> milliseconds."""
        grid = torch.tensor([[measured[i, o] for o in outputs] for i in inputs], dtype=torch.float64)
        below = grid.cummax(dim=0).values.cummax(dim=1).values
        above = grid.flip(0, 1).cummin(dim=0).values.cummin(dim=1).values.flip(0, 1)
        ms = ((below + above) / 2).tolist()
        return cls(tuple(inputs), tuple(outputs), tuple(map(tuple, ms)))


def width_times(
    geometries: Iterable[LayerGeometry],
    batch: int,
    device: torch.device,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[LayerGeometry, WidthTimes]:
    """Inference times of layers, from disk or measured now; ``progress`` hears what is being measured.

    Raises:
        UserError: the batch is empty.
    """
    if batch < 1:
        raise UserError(f"a batch has at least 1 image, not {batch}")
    tables: dict[LayerGeometry, WidthTimes] = {}
    for geometry in dict.fromkeys(geometries):
        about = [FORMAT_VERSION, batch, asdict(geometry)]
        measure = partial(measure_layer, geometry, batch, device, progress)
        times = measured_once("layer", about, device, geometry.read, measure)
        columns = len(times.outputs)
        ms = agreed([ms for row in times.ms for ms in row], device)
        rows = tuple(tuple(ms[first : first + columns]) for first in range(0, len(ms), columns))
        tables[geometry] = replace(times, ms=rows)
    return tables


def measure_layer(
    geometry: LayerGeometry, batch: int, device: torch.device, progress: Callable[[str], None]
) -> WidthTimes:
    """Time a layer at all its points."""
    progress(f"measuring a layer of {geometry.inputs} -> {geometry.outputs} channels, batch {batch}")
    inputs, outputs = geometry.points()
    calls = {
        (i, o): synchronized(geometry.call(i, o, batch, device), device) for i in inputs for o in outputs
    }
    with torch.inference_mode():
        times = interleaved_ms(calls, ROUNDS, clock=clock_of(device))
    return WidthTimes.of(inputs, outputs, {point: min(ms) for point, ms in times.items()})


def _counts(channels: int, step: int) -> tuple[int, ...]:
    counts = {max(step, round(share * channels / step) * step) for share in SHARES}
    return tuple(sorted(counts))


def _place(points: Sequence[int], count: int) -> tuple[int, float]:
    """Index of the point at or below a count, and how far it is towards the next."""
    index = bisect.bisect_right(points, count) - 1
    if index < 0 or index == len(points) - 1:
        return max(index, 0), 0.0
    return index, (count - points[index]) / (points[index + 1] - points[index])
