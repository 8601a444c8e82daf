"""Figure 4 of PruneTrain: the largest absolute weight of each channel over the epochs, for a few layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from clicktrain import wording
from clicktrain.errors import UserError
from clicktrain.report.charts import Figure, Key, Series, log_line_chart
from clicktrain.report.run_data import Run, number
from clicktrain.runs.folder import RunFolder

LAYERS = 3
"""Layers that are drawn: from the middle of each third of the network."""
MOST_LINES = 32
"""Channels of a layer that are drawn."""
MOST_POINTS = 100
"""Epochs of a channel that are drawn."""
THRESHOLD = 1e-4
"""Threshold of the paper (4.1), where the settings name none."""

_LEFT, _GONE = "curve-val", "curve-train"

Points = list[tuple[float, float]]
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class LayerChannels:
    """One layer's output channels: number in the network as it was at first -> (epoch, largest weight).

    A channel that ends before ``last_epoch``, that of the whole record, was removed there.
    """

    name: str
    points: dict[int, Points]
    last_epoch: float

    @property
    def removed(self) -> set[int]:
        """Channels that are not there in the last epoch."""
        return {number for number, own in self.points.items() if own[-1][0] < self.last_epoch}

    def unread(self, threshold: float) -> int:
        """Removed channels whose own weights were over the threshold: no layer read them any more."""
        return sum(self.points[channel][-1][1] > threshold for channel in self.removed)

    def came_back(self, threshold: float) -> dict[int, float]:
        """Channels that were under the threshold and later over it -> the largest weight they had then."""
        returned = {}
        for channel, own in self.points.items():
            values = [value for _, value in own]
            first = next((i for i, value in enumerate(values) if value <= threshold), len(values))
            later = max(values[first:], default=0.0)
            if later > threshold:
                returned[channel] = later
        return returned

    def small(self, threshold: float) -> int:
        """How many channels were under the threshold at some time."""
        return sum(any(value <= threshold for _, value in own) for own in self.points.values())


def recorded_channels(run: Run) -> list[LayerChannels]:
    """The output channels of all layers of channels.jsonl, in the network's order; none without the file."""
    folder = RunFolder(run.folder)
    layers: dict[str, dict[int, Points]] = {}
    channels: dict[str, list[int]] = {}
    last = 0.0
    try:
        for line in folder.read_channels():
            last = float(line["epoch"])
            if "channels" in line:
                channels = line["channels"]["outputs"]
            for layer, values in line["outputs"].items():
                own = layers.setdefault(layer, {})
                for channel, value in zip(channels[layer], values, strict=True):
                    if value is not None:  # no number
                        own.setdefault(int(channel), []).append((last, float(value)))
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{folder.channels} is damaged: a line of it has no channels") from None
    return [LayerChannels(layer, own, last) for layer, own in layers.items() if own]


def channel_weight_figures(run: Run) -> tuple[Figure, ...]:
    """A figure for each of a few layers; none for a run whose channels nothing pushes to zero."""
    layers = recorded_channels(run)
    threshold = number(run.config, "threshold")
    threshold = THRESHOLD if threshold is None else threshold
    return tuple(_figure(run, layer, len(layers), threshold) for layer in _middles(layers))


def _middles(layers: Sequence[LayerChannels]) -> list[LayerChannels]:
    """The middle one of each third of the layers."""
    places = {min(int((i + 0.5) * len(layers) / LAYERS), len(layers) - 1) for i in range(LAYERS)}
    return [layers[place] for place in sorted(places) if place >= 0]


def _figure(run: Run, layer: LayerChannels, layers: int, threshold: float) -> Figure:
    numbers = sorted(layer.points)
    shown = _evenly(numbers, MOST_LINES)
    gone = layer.removed
    series = []
    for channel in shown:
        own = layer.points[channel]
        end = f"removed after epoch {wording.epoch(own[-1][0])}" if channel in gone else f"{own[-1][1]:.3g}"
        points = _evenly(own, MOST_POINTS)
        css = _GONE if channel in gone else _LEFT
        series.append(Series(f"channel {channel}: {end}", points, css, bold=channel not in gone))
    cuts = [number(event, "epoch") for event in run.events if event.get("event") == "reconfigured"]
    drawn = log_line_chart(
        series,
        label=f"Largest absolute weight of channels of {layer.name} of {run.label}, over epochs",
        epochs=(1.0, max(layer.last_epoch, 2.0)),
        floor=(threshold or THRESHOLD) / 100,
        reference=threshold or None,
        marks=[epoch for epoch in cuts if epoch is not None and 1.0 <= epoch <= layer.last_epoch],
    )
    keys = (Key("still there", _LEFT), Key("removed at the dot", _GONE))
    caption = _caption(layer, layers, len(shown), threshold)
    return Figure(f"Largest weight of each channel: {layer.name}", drawn, caption, keys)


def _caption(layer: LayerChannels, layers: int, shown: int, threshold: float) -> str:
    count = len(layer.points)
    drawn = f"all {count} output channels" if shown == count else f"{shown} of {count} output channels"
    text = f"Largest absolute weight of {drawn}{'' if shown == count else ', evenly spaced'}"
    text += f", of one of {layers} layers (channels.jsonl has all of them)" if layers > LAYERS else ""
    dashed = f"dashed: the threshold {threshold:g}; " if threshold else ""
    text += f"; {dashed}dotted: reconfigurations. Of all {count}, {layer.small(threshold)} came under "
    were = "was" if len(layer.removed) == 1 else "were"
    text += f"the threshold and {len(layer.removed)} {were} removed before epoch "
    text += wording.epoch(layer.last_epoch)
    if unread := layer.unread(threshold):
        text += f" ({unread} of them with weights over it: no layer read them)"
    back = layer.came_back(threshold)
    if back:
        text += f"; {len(back)} that had been under it came back, to at most {max(back.values()):.2g}."
    else:
        text += "; none came back."
    return text


def _evenly(items: Sequence[Item], most: int) -> list[Item]:
    """At most ``most`` items, evenly spaced, including the first and the last."""
    if len(items) <= most:
        return list(items)
    places = [round(i * (len(items) - 1) / (most - 1)) for i in range(most)]
    return [items[place] for place in places]
