"""Notices training loops that do not match the arguments of `Method.attach`.

The checks compare identities and counters that PyTorch keeps anyway. Only one of them synchronizes with an
accelerator, every `_READ_EVERY` batches.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clicktrain.errors import UserError
from clicktrain.methods.contract import RunLength
from clicktrain.methods.driver.attachments import Outsiders
from clicktrain.methods.driver.network import PrunedNetwork
from clicktrain.methods.driver.optimizers import STRIKES, AttachedOptimizers
from clicktrain.methods.driver.publisher import ParametersReplaced
from clicktrain.methods.driver.several import check_not_sharded

_STEPS_UNOBSERVED = 16
"""Optimizer steps in a row without `Pruner.observe` that are one mistake."""
_BAD_LOSSES = 16
"""Losses in a row that are not finite; mixed precision may produce a few."""
_READ_EVERY = 64
"""Batches between two readings of a counter from an accelerator."""


@dataclass(eq=False)
class _Place:
    name: str
    parent: dict[str, nn.Module | None]
    child: str
    module: nn.Module
    leaf: str
    weight: Tensor

    @property
    def intact(self) -> bool:
        """Whether layer and weight are still the same objects."""
        if self.child and self.parent.get(self.child) is not self.module:
            return False
        return self.module._parameters.get(self.leaf) is self.weight


class LoopWatch:
    """What a loop has done since `attach`, as seen from hooks and `observe`."""

    def __init__(
        self, network: PrunedNetwork, optimizers: AttachedOptimizers, length: RunLength, replaces: bool
    ) -> None:
        """Start watching; ``replaces``: the method removes channels, which replaces parameters."""
        self._network, self._optimizers = network, optimizers
        self.outsiders = Outsiders(network.model, optimizers, replaces)
        self._places: list[_Place] = []
        self._version = 0
        self.length = length
        self._outdated = False
        network.publisher.subscribe(self._note_replaced, ParametersReplaced)
        self._unstepped = self._unobserved = self._moved = self._without_gradient = 0
        self._stepped, self._first = False, True
        self._written_by_others = 0
        self._zeros_lost = self._ran_over = False
        self._bad_losses: Tensor | int = 0
        self._look_again()
        masked = next(iter(network.masks.values()), None)  # of a method that masks before the first batch
        self._masks_on = None if masked is None else masked.device
        self._kind = torch.empty(0)

    def observed(self, loss: Tensor, seen: int, over: bool) -> None:
        """Check the loop at a batch, after ``seen`` others; ``over``: all epochs of the run were done before.

        A mistake made often enough, or a network that was replaced, is a UserError.
        """
        self._check_network()
        if self._first:  # weights may have been loaded since attach
            self._first = False
            self._look_again()
            self._note_kind()
        self._count_bad(loss, seen)
        version = self._versions()
        if self._stepped:
            self._unstepped = self._moved = 0
            if version != self._version:
                self._written_elsewhere()
                version = self._versions()
        else:
            self._unstepped += 1
            self._moved += version != self._version
        self._version, self._stepped, self._unobserved = version, False, 0
        self.outsiders.watch()
        self._check_steps()
        if over and not self._ran_over:
            self._ran_over = True
            warnings.warn(
                f"the loop runs longer than attach expects (epochs={self.length.epochs}, "
                f"steps_per_epoch={self.length.steps_per_epoch}): what the method decides by the length of "
                "the run came too early",
                stacklevel=3,
            )

    def before_step(self, optimizer: Optimizer) -> None:
        """Raise a UserError if `observe` has not been called for long, or no gradient reaches the network."""
        self._unobserved += 1
        if self._unobserved > _STEPS_UNOBSERVED * len(self._optimizers.units):
            raise UserError(
                f"the {type(optimizer).__name__} has taken {_STEPS_UNOBSERVED} steps without a call of "
                "pruner.observe(loss): call it after every backward(), or end the run by pruner.finish()"
            )
        self._check_network()
        if self._network.frozen or not self._places or self._unobserved > 1:
            return
        if any(place.weight.grad is not None for place in self._places):
            self._without_gradient = 0
            return
        self._without_gradient += 1
        if self._without_gradient >= STRIKES:
            raise UserError(
                f"{STRIKES} optimizer steps in a row found no gradient in any layer to be pruned: backward() "
                "is not called before the step, or the loop trains a copy of the network that was attached"
            )

    def stepped(self) -> None:
        """Note that an optimizer has stepped and the method's actions are carried out."""
        self._stepped = True
        if self._outdated:
            self._look_again()
        self._version = self._versions()

    def batches_or_steps(self, seen: int) -> int:
        """Batches observed and steps taken since."""
        return seen + self._unobserved

    def warn_of_lost_zeros(self, revived: Sequence[str], stacklevel: int) -> None:
        """Warn once about pruned weights that something unattached has written."""
        if revived and not self._zeros_lost:
            self._zeros_lost = True
            warnings.warn(
                f"pruned weights of {_some(revived)} were no longer zero and are cut again: weights were "
                "loaded after the hard prune, or an optimizer trains them that attach was not given",
                stacklevel=stacklevel,
            )

    def _look_again(self) -> None:
        network = self._network
        modules = dict(network.model.named_modules())
        self._places = []
        for name in (layer.name for layer in network.prunable.layers if layer.name in modules):
            module, (parent, _, child) = modules[name], name.rpartition(".")
            leaf = "values" if "values" in module._parameters else "weight"
            weight = module._parameters.get(leaf)
            if weight is not None:
                self._places.append(_Place(name, modules[parent]._modules, child, module, leaf, weight))
        self.outsiders.look_again()
        self._outdated = False
        self._version = self._versions()

    def _note_replaced(self, replaced: ParametersReplaced) -> None:
        self._outdated = True

    def _versions(self) -> int:
        """A number that grows whenever a prunable weight is written in place."""
        return sum(place.weight._version for place in self._places)

    def _check_network(self) -> None:
        if self._outdated:
            self._look_again()
        for place in self._places:
            if not place.intact:
                check_not_sharded(self._network.model)
                now = place.module._parameters.get(place.leaf)
                if now is not None and now.device != place.weight.device:
                    raise _moved(place.weight, now)
                raise UserError(
                    f"the layer {place.name}, or its weight, was replaced by another after attach: change "
                    "the network first and attach the method to the changed one"
                )
        if self._places and not self._first:
            weight, kind = self._places[0].weight, self._kind
            if weight.device != kind.device or weight.dtype is not kind.dtype:
                raise _moved(kind, weight)

    def _note_kind(self) -> None:
        """Note dtype and device at the first batch; only masks depend on them before."""
        if self._places:
            weight = self._places[0].weight
            if self._masks_on is not None and weight.device != self._masks_on:
                raise _moved(weight.new_empty(0, device=self._masks_on), weight)
            self._kind = weight.new_empty(0)

    def _written_elsewhere(self) -> None:
        """Cut pruned weights again that were written after an optimizer's step; checked a few times only."""
        if not self._network.frozen or self._written_by_others >= STRIKES:
            return
        self._written_by_others += 1
        revived = self._network.revived()
        with torch.no_grad():
            self._network.mask_weights()
        self.warn_of_lost_zeros(revived, stacklevel=5)

    def _check_steps(self) -> None:
        names = " and ".join(type(unit.outer).__name__ for unit in self._optimizers.units)
        if self._moved >= STRIKES:
            raise UserError(
                f"the weights change from batch to batch, but the attached {names} takes no step: attach the "
                "optimizer whose step() is called, and make it before attach"
            )
        if self._unstepped > self._most_unstepped:
            raise UserError(
                f"observe was called {self._unstepped} times without a step of the attached {names}: call "
                "its step(), or attach the optimizer that trains this network"
            )

    @property
    def _most_unstepped(self) -> int:
        """Most batches whose gradients may be accumulated: an epoch, or 64 unless that is much of the run."""
        return max(self.length.steps_per_epoch, min(64, self.length.total // 4))

    def _count_bad(self, loss: Tensor, seen: int) -> None:
        if loss.device.type == "cpu":
            count = 0 if math.isfinite(loss.item()) else int(self._bad_losses) + 1
            self._bad_losses = count
        else:
            self._bad_losses = (self._bad_losses + 1) * ~torch.isfinite(loss)
            if seen % _READ_EVERY:
                return
            count = int(self._bad_losses)
        if count >= _BAD_LOSSES:
            raise UserError(
                f"the last {count} losses were not finite numbers: training has diverged; lower the learning "
                "rate, or look for the first batch whose loss is NaN"
            )


def _moved(then: Tensor, now: Tensor) -> UserError:
    return UserError(
        f"the network was {_kind(then)} when its pruning began and is {_kind(now)} now: "
        "move or cast it before making the optimizer and calling attach"
    )


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _some(names: Iterable[str], most: int = 3) -> str:
    listed = list(names)
    shown = ", ".join(listed[:most])
    return shown if len(listed) <= most else f"{shown} and {len(listed) - most} more layers"
