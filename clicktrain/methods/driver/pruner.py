"""The driver: runs a method inside any training loop, on optimizer step hooks."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from clicktrain.comm.agreement import mean_over_processes
from clicktrain.comm.kept_exchange import ExchangedMasks, check_hooks
from clicktrain.errors import MissedTarget, NetworkCollapsed, UserError, shown
from clicktrain.formats.packed import Patterns
from clicktrain.graph import Inputs, as_inputs
from clicktrain.graph.prunable import PrunableLayers
from clicktrain.latency.network_times import MeasureMasks
from clicktrain.methods.contract import (
    Action,
    ApplyMasks,
    FreezeMasks,
    MethodHooks,
    PruningPlan,
    Reconfigure,
    Record,
    RestoreTensors,
    RunLength,
    SilenceChannels,
    StepInfo,
)
from clicktrain.methods.driver.acceleration import Acceleration
from clicktrain.methods.driver.attachments import Claim, check_dense, check_free, check_network
from clicktrain.methods.driver.averages import CopyNote
from clicktrain.methods.driver.loop_watch import LoopWatch
from clicktrain.methods.driver.network import PrunedNetwork
from clicktrain.methods.driver.optimizers import (
    AttachedOptimizers,
    OptimizerRound,
    OptimizerUnit,
    check_loaded_state,
    learning_rate_of,
    relative_rates_of,
)
from clicktrain.methods.driver.progress import Progress, at_chance, no_gradient
from clicktrain.methods.driver.publisher import (
    ChannelsRemoved,
    EpochEnd,
    Kind,
    MasksFrozen,
    ParametersReplaced,
    W,
    Wrapped,
)
from clicktrain.methods.driver.several import SameGradients, check_not_sharded
from clicktrain.methods.driver.steps import StepHooks, as_loss
from clicktrain.methods.outcome import Outcome, Reached
from clicktrain.runs.events import Event, OutcomeEvent
from clicktrain.settings import try_choices
from clicktrain.sparsity.channel_lasso import ChannelAxis
from clicktrain.surgery import SurgeryPlan, silence_


class Pruner:
    """One method at work on one model and its optimizers; made by `Method.attach`.

    Call `observe(loss)` once per backward pass, before ``optimizer.step()``; everything else happens in the
    optimizers' step hooks. `finish` ends the run at its targets as far as possible; `outcome` compares.

    With several optimizers, those that hold prunable weights count (the first one if none does). A step of
    the method is a round: after `observe`, each of them steps once, in any order. The method sees the
    gradients before the first of these steps and decides after the last; its learning rate is that of the
    first of them in the list. The others may step at any time. An optimizer that skips a round (its
    gradients were not finite) leaves the round open, and its batches count in the next one.
    """

    def __init__(
        self,
        method: MethodHooks[Any],
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        length: RunLength,
        packed: bool = False,
        example: Any = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        measure: MeasureMasks | None = None,
        accelerate: bool | None = None,
    ) -> None:
        if accelerate not in (None, False, True):
            raise UserError(f"accelerate is True, False, or None for where it pays, not {shown(accelerate)}")
        packed = packed or bool(accelerate)
        if not all(_is_count(number) for number in (length.epochs, length.steps_per_epoch)):
            raise UserError(
                f"a run has at least 1 epoch of 1 batch, got epochs={length.epochs}, "
                f"steps_per_epoch={length.steps_per_epoch}"
            )
        check_network(model)
        if method.prunes:
            check_dense(model)
        self._optimizers = AttachedOptimizers(optimizer)
        check_free([*self._optimizers.all, *model.modules()])
        self.method = method
        self.progress = Progress(length)
        self.events: list[dict[str, Any]] = []
        self._on_event = on_event
        self._ended = ""
        inputs = None if example is None else as_inputs(example, model)
        if inputs is not None and not inputs.tensors():
            raise UserError(f"example is {shown(example)}, which holds no tensor: give a batch of inputs")
        prunable = replace(method.find_prunable(model, self._optimizers.parameters()), example=inputs)
        try_choices(method, prunable.layers)
        self.method = method = method.fitted(prunable)
        weights = [layer.weight for layer in prunable.layers]
        self._optimizers.check(model, weights, packed, shrinks=method.reads_graph)
        self.network = PrunedNetwork(model, self._optimizers.all, prunable, packed)
        self.subscribe(self._find_holders, ParametersReplaced)
        self._acceleration: Acceleration | None = None
        if packed and accelerate is not False:
            self._acceleration = Acceleration(
                model, self.network.publisher, self._record, self._batches_left, always=bool(accelerate)
            )
        self._state = method.init(self._prunable, length)
        self._measure = measure
        method.use_measure(self._state, self._prunable, measure)
        self._plan = method.plan(self._prunable, length)
        self._collapse: str | None = None
        self._steps = StepHooks(
            self._optimizers.unit_of,
            self._before_step,
            self._after_step,
            self._after_closure,
            self._after_closure_again,
        )
        self._looked_at_state = False
        self._most_batches = 1
        """Batches of the longest step so far."""
        self._kept_only = False
        """Processes have exchanged gradients of kept positions only, for the step to come."""
        self._round = OptimizerRound()
        self._holders = self._optimizers.holders(weights)
        """Those whose steps make a round."""
        self._norm_scaled = method.reads_graph and self._optimizers.scale_with_weights(self._holders)
        if packed:
            self.network.check_packable()
        self._copies = CopyNote(model)
        self._carry_out(method.at_start(self._state, self._prunable, length))
        self._watch = LoopWatch(self.network, self._optimizers, length, replaces=method.reads_graph)
        self._same_gradients = SameGradients(self.network.publisher)
        self._handles: list[RemovableHandle] = []
        for one in self._optimizers.all:
            self._handles.append(one.register_step_pre_hook(self._steps.before))
            self._handles.append(one.register_step_post_hook(self._steps.after))
            if hasattr(one, "_optimizer_load_state_dict_pre_hooks"):  # not without Optimizer.__init__
                self._handles.append(one.register_load_state_dict_pre_hook(check_loaded_state))
                self._handles.append(one.register_load_state_dict_post_hook(self._after_load))
        if method.reads_graph and (example is None or method.keeps_inputs):
            self._handles.append(model.register_forward_pre_hook(_InputHook(self), with_kwargs=True))
        modules = [model, *(layer.module for layer in self._prunable.layers)]
        self._claim = Claim(method.name, [*self._optimizers.all, *modules])
        self._ask_for_gradients()

    # ---- what a loop calls ------------------------------------------------------------------

    def observe(self, loss: Tensor) -> None:
        """Take the loss of a batch after its backward pass; mistakes of the loop are reported here.

        Args:
            loss: 0-dim tensor, unscaled, the mean over this batch and not divided by the number of
                accumulated batches: the loss slope of stage 1 is absolute. Reading it does not synchronize
                with its device. A loss that is not finite counts as the one before.

        Raises:
            UserError: the run is over; this is no scalar loss; no attached optimizer steps (for longer than
                gradients can be accumulated, or at once where weights change all the same); losses stay not
                finite; the network, a layer of it, its device or its dtype is another than at attach; or a
                parameter that would lose channels is trained by an optimizer that attach was not given.
            NetworkCollapsed: pruning has destroyed the network, see `clicktrain.methods.driver.progress`.
        """
        if self._ended:
            raise UserError(f"observe was called after {self._ended}: attach a method again to go on pruning")
        if not isinstance(loss, Tensor):
            raise UserError(
                f"observe takes the loss as a tensor, not a {type(loss).__name__}: pruner.observe(loss) "
                "after loss.backward()"
            )
        if loss.numel() != 1:
            raise UserError(f"observe takes a scalar loss, not a tensor of shape {tuple(loss.shape)}")
        value = mean_over_processes(loss.detach().float().reshape(()).clone())
        self._close_epoch()
        self.check_alive()
        self._watch.observed(value, self.progress.seen, over=self.progress.epoch >= self.length.epochs)
        self.progress.observe(value)
        if self._steps.begun:
            self._steps.forget_begun()
        if self.frozen and len(self._optimizers.all) > len(self._optimizers.units):
            with torch.no_grad():
                self.network.mask_gradients()  # SAM moves weights by them before any step
        self._ask_for_gradients()

    def follow(self, average: nn.Module) -> None:
        """Have a moving average of the network masked, shrunk, packed and unpacked with it.

        Call it once, at any time of the run: the average catches up with what was done to the network, and
        ``average.update_parameters(model)`` works as before. An ``AveragedModel`` that is made after `attach`
        is also found without this call, when masks are frozen or channels removed.

        Args:
            average: ``torch.optim.swa_utils.AveragedModel(model)`` (EMA or SWA), or any deep copy of the
                network, also inside a wrapper that calls it ``module``.

        Raises:
            UserError: it is not a copy of this network; nothing has been changed.
        """
        self.network.follow(average)

    def _find_averages(self) -> None:
        for average in self._copies.averages(self.network.averages):
            self.network.follow(average)

    def wrapped(self, wrap: Callable[[nn.Module], W]) -> Wrapped[W]:
        """Wrap the network for a loop; the wrapper is rebuilt whenever parameters are replaced.

        ``wrap`` is ``DistributedDataParallel``, ``torch.compile``, or a function that captures CUDA graphs.
        Where it registers a communication hook, it makes the hook's state too (`clicktrain.comm`).

        Raises:
            UserError: when the network is wrapped, for a wrapper that shards it (FSDP), or a hook that cannot
                be used with masks.
        """

        def checked(model: nn.Module) -> W:
            self.network.leave_out_index()
            wrapper = wrap(model)
            check_not_sharded(wrapper)
            if self.method.prunes:
                check_hooks(wrapper)
            return wrapper

        return Wrapped(self.model, self.network.publisher, checked)

    def plan(self) -> PruningPlan:
        """What will be pruned, to what density, by what, and why a layer is left alone; printable.

        A method that removes channels shows what it would remove from the network as it is now.
        """
        if self.method.reads_graph and not self.frozen:
            return self.method.plan(self._prunable, self.length, self._state)
        return self._plan

    def resize_epoch(self, steps_per_epoch: int) -> None:
        """Change the number of batches (calls of `observe`) of the epochs to come, between two epochs.

        Nothing else is needed where the batch grows after channels are removed (PruneTrain 4.3); the learning
        rate is the caller's.

        Raises:
            UserError: fewer than 1, or in the middle of an epoch.
        """
        if not _is_count(steps_per_epoch):
            raise UserError(f"an epoch has at least 1 batch, not {steps_per_epoch!r}")
        self._close_epoch()
        if self.progress.in_epoch:
            raise UserError("the number of batches can change between two epochs only")
        self.progress.length = self._watch.length = RunLength(self.length.epochs, steps_per_epoch)

    def subscribe(self, listener: Callable[[Any], object], kind: Kind | None = None) -> RemovableHandle:
        """Call a function with every decision and every change of the network, as they happen.

        Args:
            listener: called with an `Event` (`clicktrain.runs.events`) or a `Notification`
                (`clicktrain.methods.driver.publisher`). It must not change the network.
            kind: a class of these, or a tuple of classes; all of them if it is left out.

        Returns:
            A handle whose ``remove()`` ends the subscription.
        """
        if not callable(listener):
            raise UserError(f"subscribe() takes a function of one event, not {shown(listener)}")
        return self.network.publisher.subscribe(listener, kind)

    def finish(self, packed: bool = False) -> nn.Module:
        """End the run: hard prune if that has not happened, remove the hooks, return the model.

        A result that misses its target by more than 5% is a `clicktrain.errors.MissedTarget` warning. With
        several processes, all of them have to call it.

        Args:
            packed: return the model with packed convolutions instead of a plain module with zeros.

        Raises:
            NetworkCollapsed: pruning has destroyed the network.
        """
        if self._ended == "finish()":
            warnings.warn("finish was called twice: the second call changes nothing", stacklevel=2)
            return self.model
        self._close_epoch()
        self._find_averages()
        cut = not self.frozen and self._cut_now()
        revived = self.network.revived()
        with torch.no_grad():
            self.network.mask_weights()
        self.network.finish(packed)
        self.close()
        self._ended = "finish()"
        done = self.progress.position
        if cut and self._watch.batches_or_steps(self.progress.seen) and done < self.length.epochs:
            warnings.warn(
                f"the loop ended after {done:.3g} of the {self.length.epochs} epochs given to attach "
                f"(of {self.length.steps_per_epoch} calls of observe each): the network was pruned at once, "
                "without training afterwards",
                stacklevel=2,
            )
        self._watch.warn_of_lost_zeros(revived, stacklevel=3)
        self.check_alive()
        self._conclude()
        return self.model

    def outcome(self) -> Outcome:
        """Each target, what is reached, and why not more; printable, and final after `finish`."""
        n = self.network
        now = n.prunable.conv_weights
        reached = Reached(n.prunable, n.conv_weights, now, n.nonzero_conv_weights, n.masks, self.events)
        return Outcome(tuple(self.method.targets_of(self._state, reached)))

    def _conclude(self) -> None:
        outcome = self.outcome()
        self._record(OutcomeEvent(targets=outcome.to_json()))
        for sentence in outcome.warnings:
            warnings.warn(sentence, MissedTarget, stacklevel=3)

    @torch.no_grad()
    def _cut_now(self) -> bool:
        """Let the method decide what is undecided; whether that removed anything."""
        actions = self.method.at_end(self._state, self._prunable)
        self._carry_out(actions)
        return any(isinstance(a, FreezeMasks) or (isinstance(a, Reconfigure) and a.plan) for a in actions)

    def close(self) -> None:
        """Remove the hooks; the model stays as it is."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._copies.remove()
        if self._acceleration is not None:
            self._acceleration.remove()
        self._ended = self._ended or "close()"
        self._claim.release()

    # ---- what a loop may ask ----------------------------------------------------------------

    @property
    def length(self) -> RunLength:
        """Length of the run, with the batches of the running epoch."""
        return self.progress.length

    @property
    def ended(self) -> bool:
        """Whether `finish` or `close` was called."""
        return bool(self._ended)

    @property
    def stage(self) -> str:
        """Name of the current stage."""
        return self.method.stage(self._state)

    @property
    def cut_epoch(self) -> float | None:
        """Epochs done when masks are to be frozen, as far as that is known; see `Method.cut_epoch`."""
        return self.method.cut_epoch(self._state, self.length)

    def latest_cut(self, length: RunLength) -> float | None:
        """Epochs done when masks would be frozen at the latest in a run of this length, from its start.

        None if the method does not say. Raises UserError if such a run is too short for the method.
        """
        return self.method.cut_epoch(self._state, length, latest=True)

    @property
    def penalized_channels(self) -> Mapping[str, tuple[ChannelAxis, ...]]:
        """Layer name -> channels that are being pushed towards zero; see `Method.penalized_channels`."""
        return self.method.penalized_channels(self._state)

    @property
    def model(self) -> nn.Module:
        """The network, always the same object."""
        return self.network.model

    @property
    def optimizer(self) -> Optimizer:
        """The first optimizer that was attached, always the same object."""
        return self._optimizers.units[0].outer

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """All optimizers that were attached, in the order given."""
        return tuple(unit.outer for unit in self._optimizers.units)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> bool of the weight's shape, True = kept; empty before anything is masked."""
        return self.network.masks

    @property
    def plans(self) -> list[SurgeryPlan]:
        """The removals of channels that were carried out, in order."""
        return self.network.plans

    @property
    def frozen(self) -> bool:
        """Whether masks are frozen."""
        return self.network.frozen

    @property
    def packed(self) -> bool:
        """Whether layers are packed once masks are frozen, or while they move: see `Method.mask_patterns`."""
        return self.network.packed

    @property
    def moving(self) -> bool:
        """Whether layers are packed whose masks still move."""
        return not self.frozen and bool(self.network.moving)

    @property
    def collecting(self) -> bool:
        """Whether packed layers compute the gradients of all weights in this step, for masks to move."""
        return self.network.collecting

    def exchanged_masks(self) -> ExchangedMasks:
        """What processes have to exchange of the gradients of masked dense weights in this step.

        For `clicktrain.comm.KeptExchange`. The masks are of weights that are pruned for good, or whose
        positions move and are nobody's in between (`Method.mask_patterns`). Packed layers are not among them:
        their parameters are kept values only.
        """
        exchanged = self.network.exchanged_masks()
        self._kept_only |= bool(exchanged.masks) and not exchanged.all_used
        return exchanged

    def mask_gradients(self) -> None:
        """Zero gradients of pruned weights that the coming step does not use.

        The optimizer's step does so by itself. Call it after `observe`, before whatever looks at gradients
        earlier, as the clipping of their norm: processes that exchange kept positions have no others.
        """
        if not self.reads_all_gradients(0):
            with torch.no_grad():
                self.network.mask_gradients()

    def reads_all_gradients(self, batches: int) -> bool:
        """Whether the optimizer's step after this many more batches uses gradients of pruned weights.

        Before masks are frozen; see `Method.wants_gradients`. Layers that are not packed have these in any
        step, whether the method reads them or not.
        """
        seen = self.progress.seen + batches
        return not self.frozen and self.method.wants_gradients(self._state, self.length, seen)

    @property
    def revision(self) -> int:
        """How often parameters were replaced: channels removed, layers packed or unpacked."""
        return self.network.revision

    @property
    def _prunable(self) -> PrunableLayers:
        return self.network.prunable

    @property
    def nonzero_conv_weights(self) -> int:
        """Nonzero convolution weights; all of them before anything is masked."""
        return self.network.nonzero_conv_weights

    @property
    def density(self) -> float:
        """Nonzero convolution weights / all convolution weights, those of removed channels included.

        Pruned weights that something else has written (loaded weights, an unattached optimizer) count as
        nonzero until they are cut again.
        """
        return self.nonzero_conv_weights / max(self.network.conv_weights, 1)

    @property
    def compression_ratio(self) -> float:
        """All convolution weights / nonzero ones (ClickTrain section 6.2)."""
        return self.network.conv_weights / max(self.nonzero_conv_weights, 1)

    def check_zeros(self) -> None:
        """Raise an AssertionError that names a layer with a nonzero pruned weight or optimizer state."""
        self.network.check_zeros()

    def check_alive(self) -> None:
        """Raise NetworkCollapsed if the last epoch showed that pruning has destroyed the network."""
        if self._collapse is not None:
            raise NetworkCollapsed(f"{self._collapse}; prune less, or later, or with another seed")

    def state_dict(self) -> dict[str, Any]:
        """The pruner state, as nested dicts of tensors, numbers and strings."""
        return {
            "method": self.method.name,
            "state": self.method.state_dict(self._state),
            **self.progress.state_dict(),
            "collapse": self._collapse,
            **self.network.state_dict(),
            "most_batches": self._most_batches,
            "events": list(self.events),
            **({} if self._acceleration is None else self._acceleration.state_dict()),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resume from a saved state: remove its channels, and pack what it had packed.

        Load weights and optimizer state after this call.
        """
        if saved["method"] != self.method.name:
            raise UserError(f"this state was saved by method {saved['method']!r}, not {self.method.name!r}")
        self._find_averages()
        if self._acceleration is not None:
            self._acceleration.load_state_dict(saved)
        self.network.load_plans(saved["plans"])
        device = next((layer.parameter.device for layer in self._prunable.layers), None)
        self.progress.load_state_dict(saved, device)
        self._watch.length = self.length
        self._state = self.method.load_state(self._prunable, self.length, saved["state"])
        self.method.use_measure(self._state, self._prunable, self._measure)
        self._collapse = saved["collapse"]
        self.events = list(saved["events"])
        self._most_batches = int(saved.get("most_batches", 1))
        self.network.load_masks(saved)
        if self.frozen:
            self._end_choice()
        else:
            self._release()
        self.network.want_gradients(False)
        self._ask_for_gradients()

    # ---- hooks ------------------------------------------------------------------------------

    def _after_closure(self, unit: OptimizerUnit, returned: Any) -> None:
        if unit in self._holders and not self.progress.losses and returned is not None:
            self.observe(as_loss(returned))

    def _after_closure_again(self) -> None:
        if self.frozen:
            with torch.no_grad():
                self.network.mask_gradients()

    def _before_step(self, optimizer: Optimizer, unit: OptimizerUnit) -> None:
        self._same_gradients.check(optimizer)
        self._look_for_gradients()
        found_inf = getattr(optimizer, "found_inf", None)
        self._watch.before_step(optimizer)
        with torch.no_grad(), self._full_precision():
            if self.frozen:
                self.network.mask_gradients()
            elif not self.progress.losses or (found_inf is not None and bool(found_inf)):
                return
            elif unit in self._holders and self._round.begins(self.progress.seen):
                self.network.check_seen(self.method.reads_graph)
                self._most_batches = max(self._most_batches, len(self.progress.losses))
                self.network.settle_gradients()
                self.method.before_step(self._state, self._prunable, self._step(optimizer))

    def _after_step(self, optimizer: Optimizer, unit: OptimizerUnit) -> None:
        self._close_epoch()
        if not self._looked_at_state:
            self._looked_at_state = True
            self._optimizers.check_first_step([layer.parameter for layer in self._prunable.layers])
        whole = unit in self._holders and self._round.ends(unit, self._holders)
        with torch.no_grad(), self._full_precision():
            if self.frozen:
                self.network.mask_weights()
                if whole:
                    self._publish_epoch()
            elif self.progress.losses and whole:
                step = self._step(optimizer)
                actions = self.method.after_step(self._state, self._prunable, step)
                self._publish_epoch()
                self._carry_out(actions)
        if whole:
            self._kept_only = False
            self.progress.stepped()
            self._ask_for_gradients(done=True)
        self._watch.stepped()

    def _publish_epoch(self) -> None:
        if self.progress.ends_epoch:
            self.network.publisher.publish(EpochEnd(self.progress.epoch))

    def _look_for_gradients(self) -> None:
        """At the last step of an epoch, once something is pruned, check that the network still learns."""
        progress = self.progress
        if not progress.losses or progress.in_epoch < self.length.steps_per_epoch:
            return
        if not self.network.masks and not self.network.plans:
            return
        assert progress.first_loss is not None
        what = no_gradient(self.model, progress.losses[-1], progress.first_loss)
        if what is not None:
            self._collapse = f"the network has collapsed in epoch {progress.epoch + 1}: {what}"

    def _after_load(self, optimizer: Optimizer) -> None:
        """Zero the loaded state of pruned weights; before the hard prune they may come back."""
        if self.frozen:
            with torch.no_grad():
                self.network.mask_state()

    def _find_holders(self, _: ParametersReplaced) -> None:
        if not (self.frozen and self.packed):  # packed, the same ones hold the values
            self._holders = self._optimizers.holders([layer.parameter for layer in self._prunable.layers])

    def _see_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.network.see(Inputs(args, kwargs), self.method.keeps_inputs and module.training)

    def _full_precision(self) -> torch.autocast:
        """Keep decisions the same when ``optimizer.step()`` is called inside autocast."""
        parameter = next(self.model.parameters(), None)
        kind = "cpu" if parameter is None else parameter.device.type
        return torch.autocast(kind, enabled=False)

    def _step(self, optimizer: Optimizer) -> StepInfo:
        progress = self.progress
        return StepInfo(
            progress.seen,
            len(progress.losses),
            torch.stack(progress.losses).mean(),
            progress.epoch_losses,
            self.length,
            epoch=progress.stepped_epoch,
            position=progress.position,
            ends_epoch=int(progress.position) > progress.stepped_epoch,
            learning_rate=learning_rate_of(self._holders[0]),
            relative_rates=relative_rates_of(self._holders),
            grad_scale=getattr(optimizer, "grad_scale", None),
            adaptive=any(not isinstance(unit.optimizers[-1], torch.optim.SGD) for unit in self._holders),
            norm_scaled=self._norm_scaled,
            whole_gradients=not self._kept_only,
        )

    def _batches_left(self) -> int:
        return max(self.length.epochs * self.length.steps_per_epoch - self.progress.seen, 1)

    def _close_epoch(self) -> None:
        """Close the epoch if all of its batches are observed, and look at its loss."""
        if self.progress.close_epoch():
            assert self.progress.first_loss is not None
            chance = at_chance(self.progress.epoch_losses, float(self.progress.first_loss), self.events)
            if chance is not None:
                self._collapse = f"the network has collapsed after epoch {chance[1]:g}: {chance[0]}"

    # ---- carrying out actions ----------------------------------------------------------------

    @torch.no_grad()
    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Record(event):
                    self._record(event)
                case ApplyMasks(masks, forget):
                    if forget and self.packed:
                        self._find_averages()
                    packed = self.network.mask(masks, forget, self._mask_patterns)
                    if packed:
                        self.method.after_packing(self._state, packed)
                    if forget:
                        self._release()
                case FreezeMasks(masks):
                    self._find_averages()
                    self.network.freeze(masks)
                    self.method.after_freeze(self._state, self.network.masks)
                    self._end_choice()
                case SilenceChannels(plan):
                    silence_(plan, self.model)
                case Reconfigure(plan, event, checked):
                    self._watch.outsiders.check_orphans(plan)
                    self._find_averages()
                    self._record(self.network.reconfigure(plan, event, checked, self._follow))
                case RestoreTensors(values):
                    self.network.restore(values)

    def _mask_patterns(self) -> dict[str, Patterns]:
        """The layers that may be packed while their masks move, with the patterns that these may have."""
        every = ((one.name, self.method.mask_patterns(self._state, one)) for one in self._prunable.layers)
        return {name: patterns for name, patterns in every if patterns is not None}

    def _release(self) -> None:
        """Note which dense layers have pruned weights that are nobody's until their masks move."""
        masks = self.network.dense_masks
        layers = (layer for layer in self._prunable.layers if layer.name in masks)
        nobodys = (one.name for one in layers if self.method.mask_patterns(self._state, one) is not None)
        self.network.released = frozenset(nobodys)

    def _ask_for_gradients(self, done: bool = False) -> None:
        """Have packed layers collect all gradients if the step that the next batch may end reads them.

        Of masked dense layers, processes then exchange all of them.

        A step holds at most as many batches as any before it, as far as is known. ``done``: a step has ended,
        so that what was collected for it has been read.
        """
        if not (self.moving or self.network.released):
            return
        after = {self.progress.seen + 1, self.progress.seen + self._most_batches}
        wanted = any(self.method.wants_gradients(self._state, self.length, seen) for seen in after)
        if wanted != self.collecting and (wanted or done):
            self.network.want_gradients(wanted)

    def _end_choice(self) -> None:
        """Masks are frozen: the plan shows what was chosen, and layers are packed."""
        self._plan = self.method.plan(self._prunable, self.length, self._state)
        if self.packed:
            self.network.pack()
        self.network.publisher.publish(MasksFrozen())

    def _follow(self, plan: SurgeryPlan) -> None:
        self.method.after_surgery(self._state, plan, self._prunable)
        self._plan = self.method.plan(self._prunable, self.length, self._state)
        self.network.publisher.publish(ChannelsRemoved(plan))

    def _record(self, event: Event) -> None:
        event = event.at(self.progress.seen, self.progress.position)
        self.events.append(event.to_json())
        if self._on_event is not None:
            self._on_event(self.events[-1])
        self.network.publisher.publish(event)


class _InputHook:
    """Passes a model's inputs to the pruner; in a copy or pickle of the model it does nothing."""

    def __init__(self, pruner: Pruner | None) -> None:
        self._pruner = (lambda: None) if pruner is None else weakref.ref(pruner)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        pruner = self._pruner()
        if pruner is not None:
            pruner._see_inputs(module, args, kwargs)

    def __reduce__(self) -> tuple[type[_InputHook], tuple[None]]:
        return _InputHook, (None,)


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1
