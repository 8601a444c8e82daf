"""The driver: carries a method through a training loop, ours or anybody's, on optimizer step hooks."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from clicktrain.accounting.agreement import mean_over_processes
from clicktrain.errors import MissedTarget, NetworkCollapsed, UserError
from clicktrain.methods.base import (
    Action,
    ApplyMasks,
    Event,
    FreezeMasks,
    Method,
    PruningPlan,
    Reconfigure,
    Record,
    RestoreTensors,
    RunLength,
    SilenceChannels,
    Step,
)
from clicktrain.methods.collapse import at_chance, no_gradient
from clicktrain.methods.outcome import Outcome, Reached
from clicktrain.methods.pruned_network import PrunedNetwork
from clicktrain.methods.sparse_latency import MeasureMasks
from clicktrain.methods.survey import Survey
from clicktrain.methods.wrapping import W, Wrapped
from clicktrain.sparsity.channel_lasso import ChannelAxis
from clicktrain.surgery import SurgeryPlan


class Pruner:
    """One method at work on one model and its optimizer. Made by `Method.attach`.

    Call `observe(loss)` once per backward pass, before ``optimizer.step()``; everything else rides on the
    optimizer's step hooks. `finish` ends the run at what was asked for, as far as can be; `outcome` says how
    far that is.
    """

    def __init__(
        self,
        method: Method[Any],
        model: nn.Module,
        optimizer: Optimizer,
        length: RunLength,
        *,
        packed: bool = False,
        example: Tensor | None = None,
        on_event: Callable[[Event], None] | None = None,
        measure: MeasureMasks | None = None,
    ) -> None:
        if length.epochs < 1 or length.steps_per_epoch < 1:
            raise UserError(
                f"a run has at least 1 epoch of 1 batch, got epochs={length.epochs}, "
                f"steps_per_epoch={length.steps_per_epoch}"
            )
        if isinstance(model, DistributedDataParallel | nn.DataParallel):
            raise UserError(
                f"attach takes the network itself, not a {type(model).__name__} around it, which would keep "
                "parameters that are replaced: attach first, then call pruner.wrapped(...) to wrap it"
            )
        self.method = method
        self.length = length
        self.events: list[Event] = []
        self._on_event = on_event
        self._at_epoch_end: list[Callable[[int], None]] = []
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        found = replace(method.survey(model, trained), example=example, measure=measure)
        self.network = PrunedNetwork(model, optimizer, found, packed)
        self._state = method.init(self._found, length)
        self._plan = method.plan(self._found, length)
        self._seen = 0
        self._epoch = 0
        self._in_epoch = 0
        self._stepped_epoch = 0
        self._losses: list[Tensor] = []
        self._epoch_loss: Tensor | None = None
        self._epoch_losses: list[float] = []
        self._depth = 0
        self._first_loss: Tensor | None = None
        self._collapse: str | None = None
        if packed:
            self.network.check_packable()
        self._carry_out(method.at_start(self._state, self._found, length))
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if method.reads_graph and (example is None or method.keeps_inputs):
            self._handles.append(model.register_forward_pre_hook(_InputHook(self)))

    # ---- what a loop calls ------------------------------------------------------------------

    def observe(self, loss: Tensor) -> None:
        """Tell the loss of a batch whose gradients have just been computed.

        Args:
            loss: 0-dim tensor, unscaled, the mean over this batch and not divided by the number of
                accumulated batches: the loss slope of stage 1 is absolute. The value is read on its own
                device, without waiting for it.

        Raises:
            NetworkCollapsed: pruning has destroyed the network, see `clicktrain.methods.collapse`.
        """
        if loss.numel() != 1:
            raise ValueError(f"observe takes a scalar loss, got a tensor of shape {tuple(loss.shape)}")
        value = mean_over_processes(loss.detach().float().reshape(()).clone())
        self._close_epoch()
        self.check_alive()
        self._first_loss = value.clone() if self._first_loss is None else self._first_loss
        self._losses.append(value)
        self._epoch_loss = value.clone() if self._epoch_loss is None else self._epoch_loss + value
        self._seen += 1
        self._in_epoch += 1
        self._depth = 0

    def wrapped(self, wrap: Callable[[nn.Module], W]) -> Wrapped[W]:
        """The network as a loop calls it inside a wrapper that is made anew when parameters are replaced.

        ``revision`` counts how often that has happened: when channels have gone, and when convolutions are
        packed or unpacked.

        Args:
            wrap: makes the wrapper: ``DistributedDataParallel``, ``torch.compile``, or a function that
                captures CUDA graphs.
        """
        return Wrapped(self, wrap)

    def plan(self) -> PruningPlan:
        """What will be pruned, to what density, by what, and why a layer is left alone; printable.

        Of a method that removes channels: what it would remove from the network as it is at this moment.
        """
        if self.method.reads_graph and not self.frozen:
            return self.method.plan(self._found, self.length, self._state)
        return self._plan

    def resize_epoch(self, steps_per_epoch: int) -> None:
        """Tell that the epochs to come have another number of batches, because the batch has another size.

        Call it between two epochs. Nothing else is needed where the batch grows after channels have gone
        (PruneTrain 4.3; ``plans`` is longer then); the learning rate is the caller's.

        Args:
            steps_per_epoch: calls of `observe` in every epoch from the next one on.

        Raises:
            UserError: fewer than 1, or in the middle of an epoch.
        """
        if steps_per_epoch < 1:
            raise UserError(f"an epoch has at least 1 batch, not {steps_per_epoch}")
        self._close_epoch()
        if self._in_epoch:
            raise UserError("the number of batches can change between two epochs only")
        self.length = RunLength(self.length.epochs, steps_per_epoch)

    def watch_epochs(self, listener: Callable[[int], None]) -> None:
        """Have a function called at the end of every epoch, with the number of epochs done.

        It is called when the method has decided and nothing has been carried out: penalties have acted, but
        what is removed there is still in the network. Nothing is told of epochs after the hard prune.
        """
        self._at_epoch_end.append(listener)

    def finish(self, packed: bool = False) -> nn.Module:
        """End the run: hard prune if that has not happened, remove the hooks, return the model.

        A result more than 5% of what was asked away from it is a `clicktrain.errors.MissedTarget` warning.
        Where several processes train together, all of them have to call it.

        Args:
            packed: return the model with packed convolutions instead of a plain module with zeros.

        Raises:
            NetworkCollapsed: pruning has destroyed the network.
        """
        self._close_epoch()
        if not self.frozen:
            with torch.no_grad():
                self._carry_out(self.method.at_end(self._state, self._found))
        first = bool(self._handles)
        self.close()
        self.check_alive()
        if first:
            self._conclude()
        self.network.finish(packed)
        return self.model

    def outcome(self) -> Outcome:
        """What was asked for, what is reached, and why not: printable; final once `finish` was called."""
        network = self.network
        reached = Reached(
            found=network.found,
            conv_weights=network.conv_weights,
            conv_weights_now=network.found.conv_weights,
            conv_nonzero=network.nonzero_conv_weights,
            masks=network.masks,
            events=self.events,
        )
        return Outcome(tuple(self.method.targets_of(self._state, reached)))

    def _conclude(self) -> None:
        """Write the outcome down, and warn of what was missed."""
        outcome = self.outcome()
        self._record({"event": "outcome", "targets": outcome.to_json()})
        for sentence in outcome.warnings:
            warnings.warn(sentence, MissedTarget, stacklevel=3)

    def close(self) -> None:
        """Remove the hooks from the optimizer; the model stays as it is."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ---- what a loop may ask ----------------------------------------------------------------

    @property
    def stage(self) -> str:
        """Name of the current stage."""
        return self.method.stage(self._state)

    @property
    def penalised_channels(self) -> Mapping[str, tuple[ChannelAxis, ...]]:
        """Layer name -> channels that are being pushed towards zero; see `Method.penalised_channels`."""
        return self.method.penalised_channels(self._state)

    @property
    def model(self) -> nn.Module:
        """The network, always the same object."""
        return self.network.model

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer, always the same object."""
        return self.network.optimizer

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> bool, of the weight's shape, True = lives; empty before anything is masked."""
        return self.network.masks

    @property
    def plans(self) -> list[SurgeryPlan]:
        """The removals of channels that were carried out, in order."""
        return self.network.plans

    @property
    def frozen(self) -> bool:
        """Whether the masks are final."""
        return self.network.frozen

    @property
    def packed(self) -> bool:
        """Whether convolutions are, or will be, packed when the masks are final."""
        return self.network.packed

    @property
    def revision(self) -> int:
        """How often parameters have been replaced: channels gone, convolutions packed or unpacked."""
        return self.network.revision

    @property
    def _found(self) -> Survey:
        return self.network.found

    @property
    def nonzero_conv_weights(self) -> int:
        """Convolution weights that live now; all of them before anything is masked."""
        return self.network.nonzero_conv_weights

    @property
    def density(self) -> float:
        """Living convolution weights / all convolution weights, those of removed channels included."""
        return self.nonzero_conv_weights / max(self.network.conv_weights, 1)

    @property
    def compression_ratio(self) -> float:
        """All convolution weights / living convolution weights (ClickTrain section 6.2)."""
        return self.network.conv_weights / max(self.nonzero_conv_weights, 1)

    def check_zeros(self) -> None:
        """Assert that no pruned position came back, in weights or optimizer state.

        Raises:
            AssertionError: names the layer.
        """
        self.network.check_zeros()

    def check_alive(self) -> None:
        """Raise NetworkCollapsed if pruning has destroyed the network, by the signs of the last epoch."""
        if self._collapse is not None:
            raise NetworkCollapsed(f"{self._collapse}; prune less, or later, or with another seed")

    def state_dict(self) -> dict[str, Any]:
        """All that the pruner remembers, as nested dicts of tensors, numbers and strings."""
        return {
            "method": self.method.name,
            "state": self.method.state_dict(self._state),
            "seen": self._seen,
            "epoch": self._epoch,
            "in_epoch": self._in_epoch,
            "stepped_epoch": self._stepped_epoch,
            "steps_per_epoch": self.length.steps_per_epoch,
            "losses": list(self._losses),
            "epoch_loss": self._epoch_loss,
            "epoch_losses": list(self._epoch_losses),
            "first_loss": self._first_loss,
            **self.network.state_dict(),
            "events": list(self.events),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        If channels had been removed, or the state was packed, model and optimizer are made so here; load
        weights and optimizer state after this call.
        """
        if saved["method"] != self.method.name:
            raise UserError(f"this state was saved by method {saved['method']!r}, not {self.method.name!r}")
        self.network.load_plans(saved["plans"])
        self.length = RunLength(self.length.epochs, saved["steps_per_epoch"])
        self._state = self.method.load_state(self._found, self.length, saved["state"])
        self._seen, self._epoch = saved["seen"], saved["epoch"]
        self._in_epoch, self._stepped_epoch = saved["in_epoch"], saved["stepped_epoch"]
        device = next((layer.weight.device for layer in self._found.prunable), None)
        self._losses = [loss.to(device, copy=True) for loss in saved["losses"]]
        epoch_loss = saved["epoch_loss"]
        self._epoch_loss = None if epoch_loss is None else epoch_loss.to(device, copy=True)
        self._epoch_losses = list(saved["epoch_losses"])
        first_loss = saved.get("first_loss")  # not in states of older versions
        self._first_loss = None if first_loss is None else first_loss.to(device, copy=True)
        self.events = list(saved["events"])
        self.network.load_masks(saved)
        if self.frozen:
            self._plan = self.method.plan(self._found, self.length, self._state)
            self.network.pack()

    # ---- hooks ------------------------------------------------------------------------------

    # An optimizer whose step calls its parent's runs the hooks of both: only the outermost count.

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        if any(map(callable, args[1:])) or kwargs.get("closure") is not None:
            raise UserError(
                "the optimizer's step was called with a closure, whose gradients the pruner cannot read: "
                "call backward() and observe(loss) first, then optimizer.step() without one"
            )
        self._look_for_gradients()
        found_inf = getattr(optimizer, "found_inf", None)
        with torch.no_grad(), self._full_precision():
            if self.frozen:
                self.network.mask_gradients()
            elif self._losses and (found_inf is None or not bool(found_inf)):
                self.method.before_step(self._state, self._found, self._step())

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth = max(self._depth - 1, 0)
        if self._depth > 0:
            return
        self._close_epoch()
        with torch.no_grad(), self._full_precision():
            if self.frozen:
                self.network.mask_weights()
            elif self._losses:
                step = self._step()
                actions = self.method.after_step(self._state, self._found, step)
                for listener in self._at_epoch_end if step.ends_epoch else ():
                    listener(int(step.position))
                self._carry_out(actions)
        self._stepped_epoch = self._epoch
        self._losses = []

    def _look_for_gradients(self) -> None:
        """At the last step of an epoch, once something is pruned: does the network still learn?"""
        pruned = self.network.masks or self.network.plans
        if not pruned or not self._losses or self._in_epoch < self.length.steps_per_epoch:
            return
        assert self._first_loss is not None
        what = no_gradient(self.model, self._losses[-1], self._first_loss)
        if what is not None:
            self._collapse = f"the network has collapsed in epoch {self._epoch + 1}: {what}"

    def _see_inputs(self, module: nn.Module, args: Any) -> None:
        inputs = args[0] if args else None
        if isinstance(inputs, Tensor):
            self.network.see(inputs, self.method.keeps_inputs and module.training)

    def _full_precision(self) -> torch.autocast:
        """Decisions do not depend on whether ``optimizer.step()`` is called inside autocast."""
        parameter = next(self.model.parameters(), None)
        kind = "cpu" if parameter is None else parameter.device.type
        return torch.autocast(kind, enabled=False)

    def _step(self) -> Step:
        scale = getattr(self.optimizer, "grad_scale", None)
        loss = torch.stack(self._losses).mean()
        position = self._epoch + self._in_epoch / self.length.steps_per_epoch
        return Step(
            self._seen,
            len(self._losses),
            loss,
            self._epoch_losses,
            self.length,
            epoch=self._stepped_epoch,
            position=position,
            ends_epoch=int(position) > self._stepped_epoch,
            learning_rate=_effective_learning_rate(self.optimizer),
            grad_scale=scale,
            adaptive=not isinstance(self.optimizer, torch.optim.SGD),
        )

    def _close_epoch(self) -> None:
        """Note the mean loss once an epoch's batches are all seen."""
        if self._epoch_loss is not None and self._in_epoch == self.length.steps_per_epoch:
            mean = float(self._epoch_loss) / self.length.steps_per_epoch
            self._epoch_losses.append(mean)
            self._epoch_loss = None
            self._epoch, self._in_epoch = self._epoch + 1, 0
            if self._first_loss is not None:
                chance = at_chance(self._epoch_losses, float(self._first_loss), self.events)
                if chance is not None:
                    self._collapse = f"the network has collapsed after epoch {chance[1]:g}: {chance[0]}"

    # ---- the one place where actions touch the world ----------------------------------------

    @torch.no_grad()
    def _carry_out(self, actions: Any) -> None:
        for action in actions:
            self._carry_out_one(action)

    def _carry_out_one(self, action: Action) -> None:
        match action:
            case Record(event):
                self._record(event)
            case ApplyMasks(masks, forget):
                self.network.mask(masks, forget)
            case FreezeMasks(masks):
                self.network.freeze(masks)
                self._plan = self.method.plan(self._found, self.length, self._state)
                self.network.pack()
            case SilenceChannels(plan):
                self.network.silence(plan)
            case Reconfigure(plan, event, checked):
                told = self.network.reconfigure(plan, checked, self._follow)
                self._record({"event": "reconfigured", **event, **told})
            case RestoreTensors(values):
                self.network.restore(values)

    def _follow(self, plan: SurgeryPlan) -> None:
        """Channels have gone: what the method remembers shrinks with them."""
        self.method.after_surgery(self._state, plan, self._found)
        self._plan = self.method.plan(self._found, self.length, self._state)

    def _record(self, event: Event) -> None:
        full = {
            "event": event["event"],
            "step": self._seen,
            "epoch": self._epoch + self._in_epoch / self.length.steps_per_epoch,
        }
        full.update(event)
        self.events.append(full)
        if self._on_event is not None:
            self._on_event(full)


class _InputHook:
    """Shows a model's inputs to the pruner; a copy of the model gets one that shows them to nobody."""

    def __init__(self, pruner: Pruner | None) -> None:
        self._pruner = (lambda: None) if pruner is None else weakref.ref(pruner)

    def __call__(self, module: nn.Module, args: Any) -> None:
        pruner = self._pruner()
        if pruner is not None:
            pruner._see_inputs(module, args)

    def __deepcopy__(self, memo: dict[int, Any]) -> _InputHook:
        return _InputHook(None)


def _effective_learning_rate(optimizer: Optimizer) -> float:
    """Of the first group of parameters; see `Step.learning_rate`."""
    group = optimizer.param_groups[0]
    return float(group.get("lr", 1.0)) / (
        1 - float(group.get("momentum", 0.0)) * (1 - float(group.get("dampening", 0.0)))
    )
