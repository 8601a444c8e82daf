"""The networks whose exchange is timed: dense, pruned by patterns, without channels, with masks that move."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clicktrain.bench.masks import model_masks
from clicktrain.bench.step import StepCase
from clicktrain.comm import ExchangedMasks
from clicktrain.compiler import accelerate
from clicktrain.errors import UserError
from clicktrain.kernels.pack_model import pack_model_
from clicktrain.methods import Pruner, RigL
from clicktrain.surgery import apply_surgery_, channel_groups, plan_keeping

GROWS = ", units grow"
"""Added to a name where a step exchanges gradients of pruned weights too."""
CHANNELS_KEPT = 0.85
"""Share of the channels that each of PruneTrain's reconfigurations leaves, those with the largest weights."""


@dataclass
class FixedMasks:
    """Stands for a pruner whose masks are frozen; parameter -> bool of its shape."""

    masks: dict[Tensor, Tensor] = field(default_factory=dict)

    def exchanged_masks(self) -> ExchangedMasks:
        """Gradients outside the masks are not used."""
        return ExchangedMasks(self.masks)


@dataclass
class Subject:
    """A network that is trained for a few steps.

    Attributes:
        model: whose parameters the optimizer holds.
        forward: what runs it: the model itself, or its accelerated view.
        masks: what `KeptExchange` asks.
        pruner: that of a method whose masks move, which sees every step.
    """

    what: str
    model: nn.Module
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    masks: FixedMasks | Pruner
    pruner: Pruner | None = None


def names(compressions: tuple[float, ...], reconfigurations: tuple[int, ...]) -> list[str]:
    """What is timed, in the table's order; each is a name that `make` knows."""
    return [
        "dense",
        *(f"clicktrain {c:g}x" for c in compressions),
        *(f"clicktrain {c:g}x, masked dense" for c in compressions[-1:]),
        *(f"prunetrain after {k}" for k in reconfigurations),
        *(f"rigl {c:g}x" for c in compressions[-1:]),
    ]


def make(what: str, case: StepCase, interval: int) -> Subject:
    """A network by one of `names`: the same one in every process.

    ``interval``: steps between two moves, of masks that move.

    Raises:
        UserError: it cannot be pruned like this.
    """
    kind, _, rest = what.partition(" ")
    number = float(rest.removeprefix("after ").partition("x")[0]) if rest else 0.0
    model = case.network()
    if kind == "clicktrain":
        return _patterns(what, model, case, number, packed=not rest.endswith("masked dense"))
    if kind == "prunetrain":
        for _ in range(int(number)):
            _without_channels_(model, case)
    if kind == "rigl":
        return _moving(what, model, case, number, interval)
    return Subject(what, model, model, _optimizer(model), FixedMasks())


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def _accelerated(model: nn.Module, case: StepCase) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a compiler it runs on the reference operator
        return accelerate(model, case.batch()[0], rule="density")


def _patterns(what: str, model: nn.Module, case: StepCase, compression: float, *, packed: bool) -> Subject:
    """After ClickTrain's hard prune: random patterns, packed, or masked and dense."""
    masks = model_masks(model, compression, 1, case.seed)
    if not masks:
        raise UserError(f"{case.model} has no convolution that could be pruned")
    if packed:
        pack_model_(model, masks)
        return Subject(what, model, _accelerated(model, case), _optimizer(model), FixedMasks())
    held: dict[Tensor, Tensor] = {model.get_parameter(f"{name}.weight"): mask for name, mask in masks.items()}
    with torch.no_grad():
        for weight, mask in held.items():
            weight.mul_(mask)
    return Subject(what, model, model, _optimizer(model), FixedMasks(held))


def _without_channels_(model: nn.Module, case: StepCase) -> None:
    """One reconfiguration: of channels that may be removed, those with the smallest weights are."""
    x = case.batch()[0][:1]
    parameters = dict(model.named_parameters())
    keep = {}
    for group in channel_groups(model, x):
        leaves = group.members[0].name
        if group.fixed is not None or leaves not in parameters or parameters[leaves].dim() < 2:
            continue
        weight = parameters[leaves].detach().movedim(group.members[0].dim, 0).flatten(1)
        size = torch.stack([weight[list(rows)].abs().amax() for rows in group.members[0].indices])
        stays = torch.zeros(group.size, dtype=torch.bool)
        stays[size.topk(max(round(CHANNELS_KEPT * group.size), 1)).indices] = True
        keep[group.name] = stays
    apply_surgery_(plan_keeping(model, x, keep), model)


def _moving(what: str, model: nn.Module, case: StepCase, compression: float, interval: int) -> Subject:
    """RigL with patterns, packed from the first step; units grow in every ``interval``-th one."""
    optimizer = _optimizer(model)
    method = RigL(compression=compression, granularity="pattern", interval=interval)
    pruner = method.attach(model, optimizer, epochs=1, steps_per_epoch=10**6, packed=True)
    return Subject(what, model, _accelerated(model, case), optimizer, pruner, pruner)
