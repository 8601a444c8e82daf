"""Predicted latency of a network over the channels of its layers (When to Prune?, section 4.3).

The paper penalizes "the neuron group's saliency with the latency reduction resulting from pruning them" and
prints no formula. Here importance is divided by the time that the removal of a neuron saves, which gives
importance per millisecond.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from clicktrain.errors import UserError
from clicktrain.graph import as_inputs
from clicktrain.graph.inputs import first_tensor
from clicktrain.latency.width_times import LayerGeometry, width_times
from clicktrain.surgery.groups import Dependencies
from clicktrain.surgery.neurons import widths

LEAST_SAVING = 0.05
"""Least saving of a neuron, as a share of the mean: one that saves nothing is not worth infinity."""
_NO_WORK = ("input", "output", "attribute", "reshape", "getitem", "permute", "squeeze", "unsqueeze", "expand")


@dataclass(frozen=True, slots=True)
class Width:
    """A number of channels as a function of kept neurons: ``fixed + sum of each * kept[group]``."""

    fixed: int
    parts: tuple[tuple[str, int], ...]

    def at(self, kept: Mapping[str, int]) -> int:
        """Channels with these kept neurons per group."""
        return self.fixed + sum(each * kept[group] for group, each in self.parts)


class LatencyModel:
    """Predicts the inference time of a network from the number of kept neurons of each group.

    The times of convolutions and linear layers come from measured tables. The rest of the network (batch
    norm, activations, additions, pooling) is taken to be proportional to the elements that it produces.
    """

    def __init__(
        self, deps: Dependencies, sizes: Mapping[str, int], example: Any, batch: int, dense_ms: float
    ) -> None:
        """Measure the layers of a network with ``sizes`` neurons per prunable group.

        Raises:
            UserError: the network has layers whose time is not known.
        """
        self.batch, self.dense_ms = batch, dense_ms
        self._sizes = dict(sizes)
        kinds = ("conv", "conv_transpose", "linear")
        nodes = [node for node in deps.graph.nodes if deps.graph.operation(node) in kinds]
        layers = [self._layer(deps, node) for node in nodes]
        device = first_tensor(as_inputs(example)).device
        times = width_times([geometry for geometry, _, _ in layers], batch, device)
        self._times = [(times[geometry], inputs, outputs) for geometry, inputs, outputs in layers]
        self._elements = self._find_elements(deps)
        self._rest_ms = max(dense_ms - self._layer_ms(sizes), 0.0)

    def predict(self, kept: Mapping[str, int]) -> float:
        """Milliseconds of a batch with these kept neurons per group."""
        elements = self._elements.at(kept) / max(self._elements.at(self._sizes), 1)
        return self._layer_ms(kept) + self._rest_ms * elements

    def saved_by_a_neuron(self, kept: Mapping[str, int]) -> dict[str, float]:
        """Milliseconds that the next neurons of each group save, per neuron; never negative."""
        now, saved = self.predict(kept), {}
        for group, count in kept.items():
            fewer = min(max(1, count // 8), count - 1)
            less = self.predict({**kept, group: count - fewer}) if fewer > 0 else now
            saved[group] = max(now - less, 0.0) / max(fewer, 1)
        return saved

    def penalized(
        self, scores: Mapping[str, Tensor], kept: Mapping[str, int], strength: float
    ) -> dict[str, Tensor]:
        """Importance over saved time, the latter relative to its mean and to the power ``strength``."""
        saved = self.saved_by_a_neuron(kept)
        mean = sum(saved.values()) / max(len(saved), 1)
        if strength == 0 or mean == 0:
            return dict(scores)
        return {
            name: score / (LEAST_SAVING + saved[name] / mean) ** strength for name, score in scores.items()
        }

    def _layer_ms(self, kept: Mapping[str, int]) -> float:
        return sum(times.at(inputs.at(kept), outputs.at(kept)) for times, inputs, outputs in self._times)

    def _layer(self, deps: Dependencies, node: fx.Node) -> tuple[LayerGeometry, Width, Width]:
        module: Any = deps.graph.module(node)
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            raise UserError(
                f"latency is predicted for 2-D convolutions and linear layers; {node.target} is a "
                f"{type(module).__name__}: give a pruning ratio instead"
            )
        name, (outputs, inputs) = f"{node.target}.weight", module.weight.shape[:2]
        shape = deps.graph.shapes[node.all_input_nodes[0]]
        rows, columns = self._width(deps, name, 0, outputs), self._width(deps, name, 1, inputs)
        if isinstance(module, nn.Linear):
            geometry = LayerGeometry(
                inputs, outputs, input_hw=shape[1:-1], inputs_vary=bool(columns.parts),
                outputs_vary=bool(rows.parts),
            )  # fmt: skip
            return geometry, columns, rows
        depthwise = inputs == 1 and module.groups > 1
        if isinstance(module.padding, str):
            raise UserError(f"latency is not predicted for padding={module.padding!r} of {node.target}")
        grouped = tuple((group, each * module.groups) for group, each in columns.parts)
        columns = rows if depthwise else Width(columns.fixed * module.groups, grouped)
        geometry = LayerGeometry(
            module.in_channels, outputs, module.kernel_size, module.stride, module.padding, module.dilation,
            0 if depthwise else module.groups, shape[2:], bool(columns.parts), bool(rows.parts),
        )  # fmt: skip
        return geometry, columns, rows

    def _width(self, deps: Dependencies, name: str, dim: int, channels: int) -> Width:
        parts = tuple(
            (group.name, len(member.indices[0]))
            for group in deps.groups
            for member in group.members
            if group.name in self._sizes and (member.name, member.dim) == (name, dim)
        )
        return Width(channels - sum(each * self._sizes[group] for group, each in parts), parts)

    def _find_elements(self, deps: Dependencies) -> Width:
        """Elements per image that all but the layers of the tables produce."""
        each: Counter[str] = Counter()
        fixed = 0
        names = [group.name for group in deps.groups]
        for node in deps.graph.nodes:
            shape, word = deps.graph.shapes.get(node), deps.graph.operation(node)
            channels = deps.flow.channels.get(node)
            if shape is None or channels is None or word in (*_NO_WORK, "conv", "linear"):
                continue
            one = torch.Size(shape[1:]).numel() // max(len(channels.ids), 1)
            for place in deps.places(node):
                if place is not None and names[place[0]] in self._sizes:
                    each[names[place[0]]] += one
                else:
                    fixed += one
        # Sums over all channels of a group, divided by their number.
        return Width(fixed, tuple((name, total // self._sizes[name]) for name, total in each.items()))


def fewest_pruned(
    order: Sequence[tuple[str, int]],
    masks: Callable[[Sequence[tuple[str, int]]], dict[str, Tensor]],
    predict: Callable[[Mapping[str, int]], float],
    aim: float,
) -> dict[str, Tensor]:
    """The masks with the fewest pruned neurons whose predicted time meets ``aim``, in milliseconds.

    Args:
        order: neurons in the order in which they are pruned; all are where even that takes more than ``aim``.
        predict: kept neurons per group -> milliseconds; does not rise with more pruned neurons.
    """

    def fits(pruned: int) -> bool:
        return predict(widths(masks(order[:pruned]))) <= aim

    return masks(order[: bisect.bisect_left(range(len(order)), True, key=fits)])
