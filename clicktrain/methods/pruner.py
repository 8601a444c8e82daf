"""The driver: carries a method through a training loop, ours or anybody's, on optimizer step hooks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from clicktrain.accounting.agreement import agree_on_, agreed_text, mean_over_processes, several_processes
from clicktrain.errors import UserError
from clicktrain.kernels.pack_model import pack_model_, pack_refusals, unpack_model_
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
from clicktrain.methods.sparse_latency import MeasureMasks
from clicktrain.methods.survey import ConvLayer, LinearLayer, SeenBatch
from clicktrain.methods.wrapping import W, Wrapped
from clicktrain.sparsity.channel_lasso import ChannelAxis
from clicktrain.sparsity.masks import conv_masks, hard_prune_, mask_optimizer_state_
from clicktrain.surgery import SurgeryPlan, apply_surgery_, silence_


class Pruner:
    """One method at work on one model and its optimizer. Made by `Method.attach`.

    Call `observe(loss)` once per backward pass, before ``optimizer.step()``; everything else rides on the
    optimizer's step hooks. `finish` ends the run at the compression asked for, whatever happened.
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
        self.model = model
        self.optimizer = optimizer
        self.length = length
        self.packed = packed
        self.events: list[Event] = []
        self.masks: dict[str, Tensor] = {}
        self.plans: list[SurgeryPlan] = []
        self.revision = 0
        self.frozen = False
        self._on_event = on_event
        self._at_epoch_end: list[Callable[[int], None]] = []
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._found = replace(method.survey(model, trained), example=example, measure=measure)
        self._conv_weights = self._conv_weights_now = self._found.conv_weights
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
        if packed:
            self._check_packable()
        self._carry_out(method.at_start(self._state, self._found, length))
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if method.reads_graph and (example is None or method.keeps_inputs):
            self._handles.append(model.register_forward_pre_hook(self._see_inputs))

    # ---- what a loop calls ------------------------------------------------------------------

    def observe(self, loss: Tensor) -> None:
        """Tell the loss of a batch whose gradients have just been computed.

        Args:
            loss: 0-dim tensor, unscaled, the mean over this batch and not divided by the number of
                accumulated batches: the loss slope of stage 1 is absolute. The value is read on its own
                device, without waiting for it.
        """
        if loss.numel() != 1:
            raise ValueError(f"observe takes a scalar loss, got a tensor of shape {tuple(loss.shape)}")
        value = mean_over_processes(loss.detach().float().reshape(()).clone())
        self._close_epoch()
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

        Args:
            packed: return the model with packed convolutions instead of a plain module with zeros.
        """
        self._close_epoch()
        if not self.frozen:
            with torch.no_grad():
                self._carry_out(self.method.at_end(self._state, self._found))
        self.close()
        if self.packed and not packed:
            unpack_model_(self.model, [self.optimizer])
            self.revision += 1
        elif packed and not self.packed and self.masks:
            pack_model_(self.model, conv_masks(self.masks), [self.optimizer])
            self.revision += 1
        self.packed = packed and self.frozen
        if not self.packed:
            self._find_again()
        return self.model

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
    def nonzero_conv_weights(self) -> int:
        """Convolution weights that live now; all of them before anything is masked."""
        dead = sum(mask.numel() - int(mask.sum()) for mask in conv_masks(self.masks).values())
        return self._conv_weights_now - dead

    @property
    def density(self) -> float:
        """Living convolution weights / all convolution weights, those of removed channels included."""
        return self.nonzero_conv_weights / max(self._conv_weights, 1)

    @property
    def compression_ratio(self) -> float:
        """All convolution weights / living convolution weights (ClickTrain section 6.2)."""
        return self._conv_weights / max(self.nonzero_conv_weights, 1)

    def check_zeros(self) -> None:
        """Assert that no pruned position came back, in weights or optimizer state.

        Raises:
            AssertionError: names the layer.
        """
        if not self.frozen:
            return
        for layer, mask in self._masked():
            held = [v for v in self.optimizer.state.get(layer.weight, {}).values() if isinstance(v, Tensor)]
            for tensor in [layer.weight.detach(), *(v for v in held if v.shape == mask.shape)]:
                if bool((tensor != 0).logical_and_(~mask).any()):
                    raise AssertionError(f"a pruned position of {layer.name} is no longer zero")

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
            "plans": [json.dumps(plan.to_json()) for plan in self.plans],
            "losses": list(self._losses),
            "epoch_loss": self._epoch_loss,
            "epoch_losses": list(self._epoch_losses),
            "frozen": self.frozen,
            "packed": self.packed and self.frozen,
            "masks": dict(self.masks),
            "events": list(self.events),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        If channels had been removed, or the state was packed, model and optimizer are made so here; load
        weights and optimizer state after this call.
        """
        if saved["method"] != self.method.name:
            raise UserError(f"this state was saved by method {saved['method']!r}, not {self.method.name!r}")
        for document in saved["plans"]:
            plan = SurgeryPlan.from_json(json.loads(document))
            apply_surgery_(plan, self.model, self.optimizer)
            self._follow(plan)
        self.length = RunLength(self.length.epochs, saved["steps_per_epoch"])
        self._state = self.method.load_state(self._found, self.length, saved["state"])
        self._seen, self._epoch = saved["seen"], saved["epoch"]
        self._in_epoch, self._stepped_epoch = saved["in_epoch"], saved["stepped_epoch"]
        device = next((layer.weight.device for layer in self._found.prunable), None)
        self._losses = [loss.to(device, copy=True) for loss in saved["losses"]]
        epoch_loss = saved["epoch_loss"]
        self._epoch_loss = None if epoch_loss is None else epoch_loss.to(device, copy=True)
        self._epoch_losses = list(saved["epoch_losses"])
        self.events = list(saved["events"])
        self.frozen = saved["frozen"]
        self.masks = {layer.name: saved["masks"][layer.name].to(layer.weight.device)
                      for layer in self._found.prunable if layer.name in saved["masks"]}  # fmt: skip
        if self.frozen:
            self._plan = self.method.plan(self._found, self.length, self._state)
            self.packed = bool(saved["packed"])  # go on in the form that was saved
        if saved["packed"]:
            pack_model_(self.model, conv_masks(self.masks), [self.optimizer])
            self.revision += 1

    def _check_packable(self) -> None:
        """Refuse now what could not be packed at the hard prune, hours later."""
        names = [layer.name for layer in self._found.layers]
        refusals = pack_refusals(self.model, names, [self.optimizer])
        if refusals:
            name, reason = next(iter(refusals.items()))
            raise UserError(
                f"{name} cannot be packed: {reason}; set packed to false to train masked dense weights, "
                "or exclude the layer"
            )

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
        found_inf = getattr(optimizer, "found_inf", None)
        with torch.no_grad(), self._full_precision():
            if self.frozen:
                self._mask_gradients()
            elif self._losses and (found_inf is None or not bool(found_inf)):
                self.method.before_step(self._state, self._found, self._step())

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth = max(self._depth - 1, 0)
        if self._depth > 0:
            return
        self._close_epoch()
        with torch.no_grad(), self._full_precision():
            if self.frozen:
                self._mask_weights()
            elif self._losses:
                step = self._step()
                actions = self.method.after_step(self._state, self._found, step)
                for listener in self._at_epoch_end if step.ends_epoch else ():
                    listener(int(step.position))
                self._carry_out(actions)
        self._stepped_epoch = self._epoch
        self._losses = []

    def _see_inputs(self, module: nn.Module, args: Any) -> None:
        inputs = args[0] if args else None
        if isinstance(inputs, Tensor):
            if self._found.example is None:
                self._found = replace(self._found, example=inputs.detach()[:1].clone())
            if self.method.keeps_inputs and module.training:
                kind = inputs.device.type
                dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
                self._found = replace(self._found, seen=SeenBatch(inputs.detach(), dtype))

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
        )

    def _find_again(self) -> None:
        """Look the layers up by name: packing and unpacking replace modules."""
        found = []
        for layer in self._found.layers:
            module = self.model.get_submodule(layer.name)
            assert isinstance(module, nn.Conv2d)
            found.append(ConvLayer(layer.name, module))
        self._found = replace(self._found, layers=tuple(found))

    def _masked(self) -> list[tuple[ConvLayer | LinearLayer, Tensor]]:
        """Dense layers with their masks; packed convolutions have no pruned positions."""
        layers = self._found.linears if self.packed and self.frozen else self._found.prunable
        return [(layer, self.masks[layer.name]) for layer in layers if layer.name in self.masks]

    def _mask_gradients(self) -> None:
        for layer, mask in self._masked():
            if layer.weight.grad is not None:
                layer.weight.grad.masked_fill_(~mask, 0.0)

    def _mask_weights(self) -> None:
        for layer, mask in self._masked():
            hard_prune_(layer.weight, mask)

    def _mask_state(self) -> None:
        for layer, mask in self._masked():
            mask_optimizer_state_(self.optimizer, layer.weight, mask)

    def _close_epoch(self) -> None:
        """Note the mean loss once an epoch's batches are all seen."""
        if self._epoch_loss is not None and self._in_epoch == self.length.steps_per_epoch:
            mean = float(self._epoch_loss) / self.length.steps_per_epoch
            self._epoch_losses.append(mean)
            self._epoch_loss = None
            self._epoch, self._in_epoch = self._epoch + 1, 0

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
                self.masks = dict(masks)
                self._mask_weights()
                if forget:
                    self._mask_state()
            case FreezeMasks(masks):
                self.masks = dict(masks)
                agree_on_([self.masks[name] for name in sorted(self.masks)])
                self._mask_weights()
                self._mask_state()
                self.frozen = True
                self._plan = self.method.plan(self._found, self.length, self._state)
                if self.packed:
                    pack_model_(self.model, conv_masks(self.masks), [self.optimizer])
                    self.revision += 1
            case SilenceChannels(plan):
                silence_(plan, self.model)
            case Reconfigure(plan, event, checked):
                self._reconfigure(plan, event, checked)
            case RestoreTensors(values):
                tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
                for name, value in values.items():
                    tensors[name].copy_(value)
                    self.optimizer.state.pop(tensors[name], None)

    def _reconfigure(self, plan: SurgeryPlan, event: Mapping[str, Any], checked: bool) -> None:
        """Remove channels from the model and its optimizer, and let all that is remembered follow."""
        started = time.perf_counter()
        plan = self._agreed(plan)
        before = self._output() if checked else None
        channels = sum(row.outputs[0] for row in plan.layers)
        if plan:
            apply_surgery_(plan, self.model, self.optimizer)
            self._follow(plan)
            self.method.after_surgery(self._state, plan, self._found)
            self._plan = self.method.plan(self._found, self.length, self._state)
        seconds = time.perf_counter() - started
        after = self._output() if checked else None
        gone = {removed.name for removed in plan.removed_layers}
        rows = [row for row in plan.layers if row.name not in gone]
        self._record(
            {
                "event": "reconfigured",
                **event,
                "seconds": seconds,
                "channels_before": channels,
                "channels_after": sum(row.outputs[1] for row in rows),
                "layers_removed": [row.name for row in plan.layers if row.name in gone],
                "layers": [
                    {
                        "name": row.name,
                        "inputs": list(row.inputs),
                        "outputs": list(row.outputs),
                        "stays": row.stays,
                    }
                    for row in plan.layers
                ],
                "max_output_change": None
                if before is None or after is None
                else float((after - before).abs().max()),
            }
        )

    def _agreed(self, plan: SurgeryPlan) -> SurgeryPlan:
        """The first process's plan: others may have other statistics in their batch norms."""
        if not several_processes():
            return plan
        parameter = next(self.model.parameters())
        text = agreed_text(json.dumps(plan.to_json()), parameter.device)
        return SurgeryPlan.from_json(json.loads(text))

    def _follow(self, plan: SurgeryPlan) -> None:
        """Note a plan that was carried out, and look at the smaller model."""
        self.plans.append(plan)
        self.revision += 1
        self._found = self._found.after_surgery(plan)
        self._conv_weights_now = self._found.conv_weights
        shrunken = {
            plan.new_name(name): plan.shrink(f"{name}.weight", mask) for name, mask in self.masks.items()
        }
        self.masks = {name: mask for name, mask in shrunken.items() if name is not None}

    def _output(self) -> Tensor | None:
        """Of the last batch of inputs in evaluation mode, leaving no trace."""
        seen = self._found.seen
        if seen is None:
            return None
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            output = self.model(seen.inputs)
        finally:
            for module, mode in modes:
                module.training = mode
        return output.float() if isinstance(output, Tensor) else None

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


def _effective_learning_rate(optimizer: Optimizer) -> float:
    """Of the first group of parameters; see `Step.learning_rate`."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / (
        1 - float(group.get("momentum", 0.0)) * (1 - float(group.get("dampening", 0.0)))
    )
