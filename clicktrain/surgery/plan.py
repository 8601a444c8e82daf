"""Surgery plans: what is to be cut, as data that prints, travels as JSON and can be replayed.

A plan names tensors and layers as they are called before it is applied. Plans of one network follow each
other: the sequence, applied to a fresh model of the user's own class, makes the shrunken network.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.wording import table_lines

FORMAT_VERSION = 2

Replacement = Literal["zeros", "bias", "constant", "nothing"]
"""What is left of a layer of a removed branch: for a convolution the size of its output (``zeros``), with its
bias (``bias``); for a batch norm its constant (``constant``) or the identity (``nothing``)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Indices of one dimension of one parameter or buffer that stay, ascending, of ``size`` before."""

    name: str
    dim: int
    keep: tuple[int, ...]
    size: int


@dataclass(frozen=True, slots=True)
class RemovedLayer:
    """A layer of a residual branch that disappears (PruneTrain 4.1); see `layer_removal`."""

    name: str
    replacement: Replacement
    writable: bool = False


@dataclass(frozen=True, slots=True)
class Gate:
    """Channel gating at a layer (PruneTrain 4.2): ``channels`` of the stage's ``size``, after the cuts."""

    name: str
    kind: Literal["select", "scatter"]
    channels: tuple[int, ...]
    size: int


@dataclass(frozen=True, slots=True)
class LayerChange:
    """A row of the table: channels of a layer before and after, and why it is not smaller ("" = it is)."""

    name: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    stays: str = ""


@dataclass(frozen=True)
class SurgeryPlan:
    """One reconfiguration of a network.

    Attributes:
        cuts: one for each dimension that shrinks.
        removed_layers: of residual branches that disappear; done before the cuts.
        gates: put in after the cuts.
        layers: every convolution and linear layer, for the table.
    """

    cuts: tuple[Cut, ...] = ()
    removed_layers: tuple[RemovedLayer, ...] = ()
    gates: tuple[Gate, ...] = ()
    layers: tuple[LayerChange, ...] = field(default=(), compare=False)

    def __bool__(self) -> bool:
        """Whether the plan changes anything."""
        return bool(self.cuts or self.removed_layers or self.gates)

    @property
    def removed_names(self) -> tuple[str, ...]:
        """Convolutions that are gone, by their names before the plan."""
        return tuple(r.name for r in self.removed_layers if r.replacement in ("zeros", "bias"))

    @cached_property
    def _cuts_of(self) -> dict[str, tuple[Cut, ...]]:
        cuts: dict[str, tuple[Cut, ...]] = {}
        for cut in self.cuts:
            cuts[cut.name] = (*cuts.get(cut.name, ()), cut)
        return cuts

    def cuts_of(self, name: str) -> tuple[Cut, ...]:
        """The cuts of one parameter or buffer."""
        return self._cuts_of.get(name, ())

    def shrink(self, name: str, tensor: Tensor) -> Tensor:
        """What stays of a tensor that has one element for each of a parameter's or buffer's.

        Serves weights, momentum, statistics, averages and masks alike; the result is contiguous in memory as
        the tensor was. A tensor that is not cut is returned as it is. ``name`` is the path before the plan.

        Raises:
            UserError: the tensor has another size than the plan was made for.
        """
        result = tensor
        for cut in self.cuts_of(name):
            if cut.dim >= tensor.dim() or tensor.shape[cut.dim] != cut.size:
                raise UserError(
                    f"the plan was made for another network: {name} has shape {tuple(tensor.shape)}, "
                    f"the plan cuts {cut.size} channels along dimension {cut.dim}"
                )
            index = torch.tensor(cut.keep, dtype=torch.int64, device=tensor.device)
            result = result.index_select(cut.dim, index)
        channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
        if result is tensor or channels_last is None or tensor.is_contiguous():
            return result
        if tensor.is_contiguous(memory_format=channels_last):
            result = result.contiguous(memory_format=channels_last)
        return result

    def new_name(self, name: str) -> str | None:
        """Name of a parameter, buffer or layer after the plan; None if it is gone."""
        for removed in self.removed_layers:
            if name == removed.name or name.startswith(f"{removed.name}."):
                leaf = name[len(removed.name) + 1 :]
                stays = removed.replacement == "constant" or (
                    removed.replacement == "bias" and leaf in ("", "bias")
                )
                return name if stays else None
        for layer in {gate.name for gate in self.gates}:
            if name == layer or name.startswith(f"{layer}."):
                return f"{layer}.layer{name[len(layer) :]}"
        return name

    def to_json(self) -> dict[str, Any]:
        """Plain lists, numbers and strings for `json.dumps`."""
        return {"version": FORMAT_VERSION, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> SurgeryPlan:
        """Inverse of `to_json`.

        Raises:
            UserError: the document is not a plan, or of a newer version.
        """
        try:
            version = document["version"]
            if version != FORMAT_VERSION:
                raise UserError(
                    f"the surgery plan has format version {version}; this version reads {FORMAT_VERSION}"
                )
            return cls(
                tuple(Cut(c["name"], c["dim"], tuple(c["keep"]), c["size"]) for c in document["cuts"]),
                tuple(RemovedLayer(**removed) for removed in document["removed_layers"]),
                tuple(Gate(g["name"], g["kind"], tuple(g["channels"]), g["size"]) for g in document["gates"]),
                tuple(
                    LayerChange(row["name"], _pair(row["inputs"]), _pair(row["outputs"]), row["stays"])
                    for row in document["layers"]
                ),
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"this is not a surgery plan: {type(error).__name__} {error}") from None

    def table(self) -> str:
        """Layer, channels in and out before and after, and why a layer stays as it is."""
        gone = {removed.name for removed in self.removed_layers}
        rows = [("layer", "inputs", "outputs", "")]
        for layer in self.layers:
            note = "removed" if layer.name in gone else layer.stays
            rows.append((layer.name, _arrow(layer.inputs), _arrow(layer.outputs), note))
        return "\n".join(table_lines(rows))


def _arrow(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]} -> {pair[1]}"


def _pair(values: Any) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)


@dataclass(frozen=True, slots=True)
class OriginalChannels:
    """Where a layer's channels come from.

    ``name`` is the layer's before any surgery; ``numbers`` has, for dimension 0 (outputs) and 1 (inputs) of
    its weight, the first number of every index.
    """

    name: str
    numbers: tuple[tuple[int, ...], tuple[int, ...]]


def original_channels(model: nn.Module) -> dict[str, OriginalChannels]:
    """Name -> channels of every convolution of a network that no plan has touched: 0, 1, 2 ..."""
    channels = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            outputs, inputs = module.weight.shape[:2]
            channels[name] = OriginalChannels(name, (tuple(range(outputs)), tuple(range(inputs))))
    return channels


def renumbered(channels: Mapping[str, OriginalChannels], plan: SurgeryPlan) -> dict[str, OriginalChannels]:
    """The channels that are left after one more plan, by the names after it; layers that go drop out."""
    left = {}
    for name, layer in channels.items():
        moved = plan.new_name(f"{name}.weight")
        if moved is None:
            continue
        numbers = list(layer.numbers)
        for cut in plan.cuts_of(f"{name}.weight"):
            if cut.dim < len(numbers):
                numbers[cut.dim] = tuple(numbers[cut.dim][index] for index in cut.keep)
        left[moved.removesuffix(".weight")] = OriginalChannels(layer.name, (numbers[0], numbers[1]))
    return left
