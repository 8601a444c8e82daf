"""Changes a model, its optimizers and its moving averages together: masks, channels, packed layers."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from clicktrain.comm.agreement import agree_on_, mean_over_processes
from clicktrain.comm.collectives import GROWTH
from clicktrain.comm.kept_exchange import ExchangedMasks
from clicktrain.errors import UserError
from clicktrain.formats.packed import Patterns, Structure, bits_from_mask, mask_from_bits
from clicktrain.graph import Inputs, as_inputs
from clicktrain.graph.exchange import odd_state
from clicktrain.graph.inputs import first_of_batch, first_tensor, owned
from clicktrain.graph.observe import tensors_in
from clicktrain.graph.prunable import PrunableLayers, SeenBatch
from clicktrain.kernels.pack_model import (
    index_names,
    pack_model_,
    pack_refusals,
    settle_model_,
    unpack_model_,
)
from clicktrain.kernels.sparse_conv2d import PackedLayer
from clicktrain.methods.driver.averages import catch_up_, mask_copy_, unwrapped_average
from clicktrain.methods.driver.publisher import ChannelsRemoved, MasksMoved, ParametersReplaced, Publisher
from clicktrain.runs.events import ReconfiguredEvent
from clicktrain.sparsity.masks import hard_prune_, mask_optimizer_state_, sparsity_of
from clicktrain.surgery import SurgeryPlan, Verified, agreed_plans, apply_surgery_, verified
from clicktrain.surgery.compare import IMAGES

PACK_AT = 0.6
"""Share of zeros from which layers are packed whose masks still move: about there the fast kernels pay."""
_SCALES = ("exp_inf", "step_size")
"""What Adamax and Rprop divide or multiply by: never zero, whatever the gradients are."""


class PrunedNetwork:
    """Masks, removed channels and packed layers of one model, its optimizers and its moving averages.

    Attributes:
        model, optimizers: changed in place.
        averages: copies of the model that follow it, see `follow`; changed in place.
        prunable: the model's layers, as they are now.
        plans: surgery that was carried out, in order.
        frozen: the masks are final.
        packed: convolutions are, or will be, packed when the masks are final, or, of methods that say so,
            while they move.
        collecting: packed layers collect the gradients of all their weights; of dense ones that are masked,
            processes exchange all.
        released: dense layers with masks that move, whose pruned weights and gradients nobody uses except
            while `collecting`.
        revision: how often parameters have been replaced by others.
        conv_weights: convolution weights of the network before anything was removed.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer], prunable: PrunableLayers, packed: bool
    ) -> None:
        """Start with an unpruned model."""
        self.model, self.optimizers = model, tuple(optimizers)
        self.averages: list[nn.Module] = []
        self.prunable = prunable
        self._masks: dict[str, Tensor | None] = {}
        self._counted: dict[str, tuple[Tensor, int]] = {}
        self.plans: list[SurgeryPlan] = []
        self.frozen = False
        self.packed = packed
        self.collecting = False
        self.released: frozenset[str] = frozenset()
        self.revision = 0
        self.publisher = Publisher()
        self.conv_weights = self._conv_weights_now = prunable.conv_weights

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> bool of the weight's shape, True = kept; empty before anything is masked.

        Masks of packed layers are built from their index.
        """
        return {
            name: self._packed_layer(name).structure.mask() if mask is None else mask
            for name, mask in self._masks.items()
        }

    @property
    def kept(self) -> dict[str, int]:
        """Layer name -> weights inside its mask; empty before anything is masked."""
        known = self._counted
        new = {
            name: mask
            for name, mask in self._masks.items()
            if mask is not None and (name not in known or known[name][0] is not mask)
        }
        if new:  # one synchronization with the device for all of them
            sums = torch.stack([mask.sum() for mask in new.values()]).tolist()
            known.update({name: (new[name], total) for name, total in zip(new, sums, strict=True)})
        self._counted = {name: entry for name, entry in known.items() if self._masks.get(name) is not None}
        return {
            name: self._packed_layer(name).structure.nnz if mask is None else known[name][1]
            for name, mask in self._masks.items()
        }

    @property
    def dense_masks(self) -> dict[str, Tensor]:
        """As `masks`, without packed layers."""
        return {name: mask for name, mask in self._masks.items() if mask is not None}

    def _packed_layer(self, name: str) -> PackedLayer:
        layer = self.model.get_submodule(name)
        assert isinstance(layer, PackedLayer)
        return layer

    @property
    def moving(self) -> dict[str, PackedLayer]:
        """The layers that were packed while their masks moved, by name; also once these are frozen."""
        held = (name for name, mask in self._masks.items() if mask is None)
        layers = ((name, self._packed_layer(name)) for name in held)
        return {name: layer for name, layer in layers if layer.structure.patterns is not None}

    def mask(
        self,
        masks: Mapping[str, Tensor],
        forget: bool,
        patterns: Callable[[], Mapping[str, Patterns]] = dict,
    ) -> list[str]:
        """Zero weights that may change again; ``forget``: also their optimizer state.

        Args:
            patterns: layers that may be packed, once enough is zero and forgotten, by name, with the patterns
                of `Method.mask_patterns`.

        Returns:
            The layers that have been packed now.
        """
        held = self._move(masks)
        self.mask_weights()
        if not forget:
            return []
        self.mask_state()
        if held or not self.packed:
            return []
        able = {name: known for name, known in patterns().items() if name in masks}
        if not able or round(sparsity_of({name: masks[name] for name in able}), 2) < PACK_AT:
            return []
        for average in self.averages:
            mask_copy_(average, masks)
        return self.pack(able)

    def _move(self, masks: Mapping[str, Tensor]) -> bool:
        """Take masks over; those of packed layers as their index. Whether there are packed layers."""
        held = {name: None for name, mask in self._masks.items() if mask is None}
        self._masks = {**masks, **held}
        self._index({name: masks[name] for name in held if name in masks})
        return bool(held)

    def _index(self, masks: Mapping[str, Tensor]) -> None:
        """Have packed layers keep other positions, in the network and in its averages."""
        moved = replaced = False
        for name, mask in masks.items():
            layer = self._packed_layer(name)
            structure = Structure.from_mask(mask.to(layer.structure.device), layer.structure.patterns)
            if torch.equal(structure.flat(), layer.structure.flat()):
                continue
            moved = True
            replaced |= layer.move_(structure, self.optimizers)
            for average in self.averages:
                copy = average.get_submodule(name)
                if isinstance(copy, PackedLayer):
                    copy.move_(structure.to(copy.structure.device))
        if moved:
            self.publisher.publish(MasksMoved())
        if replaced:
            self._replaced()

    def want_gradients(self, wanted: bool) -> None:
        """Have packed layers collect the gradients of all weights from the next forward pass on, or not."""
        self.collecting = wanted
        for layer in self.moving.values():
            layer.want_dense_gradient(wanted)

    @contextlib.contextmanager
    def without_gradients(self) -> Iterator[None]:
        """Collect nothing inside, between two steps: who looks at the network sees it as in other steps."""
        wanted = self.collecting
        self.want_gradients(False)
        try:
            yield
        finally:
            self.want_gradients(wanted)

    def settle_gradients(self) -> None:
        """Bring collected gradients to the scale that the optimizer's have, at the beginning of its step."""
        for layer in self.moving.values() if self.collecting else ():
            assert layer.dense_gradient is not None
            mean_ = partial(mean_over_processes, purpose=GROWTH)
            layer.dense_gradient.settle(layer.structure, layer.values.grad, mean_)

    def freeze(self, masks: Mapping[str, Tensor]) -> None:
        """Zero weights for good; with several processes, by the masks of the first one."""
        agree_on_([masks[name] for name in sorted(masks)])
        self._move(masks)
        self.want_gradients(False)
        self.mask_weights()
        self.mask_state()
        self.frozen, self.released = True, frozenset()
        for average in self.averages:
            mask_copy_(average, self.masks)

    def mask_gradients(self) -> None:
        """Zero the gradients of weights that are pruned for good, or nobody's until their masks move."""
        for weight, mask in self.exchanged_masks().masks.items():
            if weight.grad is not None:
                weight.grad.masked_fill_(~mask, 0.0)

    def mask_weights(self) -> None:
        """Zero pruned weights."""
        for _, weight, mask in self._masked():
            hard_prune_(weight, mask)

    def mask_state(self) -> None:
        """Zero the optimizer state of pruned weights."""
        for _, weight, mask in self._masked():
            for optimizer in self.optimizers:
                mask_optimizer_state_(optimizer, weight, mask)

    def leave_out_index(self) -> None:
        """Have DistributedDataParallel leave the index of packed layers alone: all processes derive it."""
        names = index_names(self.model)
        if names:
            known = getattr(self.model, "_ddp_params_and_buffers_to_ignore", ())
            compiled = [f"_orig_mod.{name}" for name in names]
            ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
            ignore(self.model, list({*known, *names, *compiled}))  # type: ignore[no-untyped-call]

    def exchanged_masks(self) -> ExchangedMasks:
        """What processes have to exchange of the gradients of masked dense weights."""
        names = self._masks.keys() if self.frozen else self.released
        masks = {weight: mask for name, weight, mask in self._masked() if name in names}
        return ExchangedMasks(masks, self.collecting and not self.frozen)

    def _masked(self) -> list[tuple[str, Tensor, Tensor]]:
        """Names, weights and masks of dense layers; packed layers hold no pruned weights."""
        masked = ((layer, self._masks.get(layer.name)) for layer in self.prunable.layers)
        return [(layer.name, layer.weight, mask) for layer, mask in masked if mask is not None]

    def check_zeros(self) -> None:
        """Raise an AssertionError that names a layer with a nonzero pruned weight or optimizer state."""
        if not self.frozen:
            return
        for name, weight, mask in self._masked():
            states = (optimizer.state.get(weight, {}) for optimizer in self.optimizers)
            held = [value for state in states for key, value in state.items() if key not in _SCALES]
            for tensor in (weight.detach(), *(v for v in held if isinstance(v, Tensor))):
                if tensor.shape == mask.shape and bool((tensor != 0).logical_and_(~mask).any()):
                    raise AssertionError(f"a pruned position of {name} is no longer zero")

    def revived(self) -> list[str]:
        """Layers with frozen masks in which something else has written pruned weights."""
        if not self.frozen:
            return []
        return [name for name, weight, mask in self._masked() if bool((weight.detach()[~mask] != 0).any())]

    @property
    def nonzero_conv_weights(self) -> int:
        """Nonzero convolution weights; all of them before anything is masked.

        Once masks are frozen, this includes pruned weights that something else has written.
        """
        pruned = 0
        for layer in self.prunable.counted:
            mask = self._masks.get(layer.name)
            if mask is not None:
                pruned += mask.numel() - int(mask.sum())
                if self.frozen and not self.packed:
                    pruned -= int((layer.weight.detach()[~mask] != 0).sum())
            elif layer.name in self._masks:
                structure = self._packed_layer(layer.name).structure
                pruned += structure.numel - structure.nnz
        return self._conv_weights_now - pruned

    def reconfigure(
        self,
        plan: SurgeryPlan,
        event: ReconfiguredEvent,
        checked: bool,
        follow: Callable[[SurgeryPlan], None],
    ) -> ReconfiguredEvent:
        """Remove channels and layers; with several processes, by the plan of the first one.

        Args:
            plan: is tried on a copy first (`clicktrain.surgery.verified`): channels without which the network
                computes something else stay, with a warning.
            event: what the method decided by; returned with what was removed, stayed and changed.
            checked: compare outputs of the last batch before and after.
            follow: called with what has been removed, unless that is nothing.
        """
        started = time.perf_counter()
        result = Verified(plan) if self.prunable.example is None else self._verified(plan)
        plan = agreed_plans({1: result.plan}, next(self.model.parameters()).device)[1]
        before = self._output() if checked else None
        if plan:
            self.remove(plan)
            follow(plan)
        seconds = time.perf_counter() - started
        after = self._output() if checked else None
        gone = {removed.name for removed in plan.removed_layers}
        return replace(
            event,
            seconds=seconds,
            channels_before=sum(row.outputs[0] for row in plan.layers),
            channels_after=sum(row.outputs[1] for row in plan.layers if row.name not in gone),
            held=result.held,
            layers_removed=[row.name for row in plan.layers if row.name in gone],
            layers=[
                {
                    "name": row.name,
                    "inputs": list(row.inputs),
                    "outputs": list(row.outputs),
                    "stays": row.stays,
                }
                for row in plan.layers
            ],
            max_output_change=None
            if before is None or after is None
            else float((after - before).abs().max()),
        )

    def _verified(self, plan: SurgeryPlan) -> Verified:
        """What remains of a plan after comparing the smaller network on the last batch or the example."""
        seen = self.prunable.seen
        result = verified(plan, self.model, self.prunable.example if seen is None else seen.inputs)
        result.warn()
        return result

    def remove(self, plan: SurgeryPlan) -> None:
        """Remove channels from the model, its optimizers and its averages."""
        apply_surgery_(plan, self.model, self.optimizers)
        for average in self.averages:
            apply_surgery_(plan, average)
        self.plans.append(plan)
        self.prunable = self.prunable.renamed(plan.new_name)
        self._conv_weights_now = self.prunable.conv_weights
        shrunken = {
            plan.new_name(name): plan.shrink(f"{name}.weight", mask) for name, mask in self.masks.items()
        }
        self._masks = {name: mask for name, mask in shrunken.items() if name is not None}
        self._replaced()

    def _replaced(self) -> None:
        self.revision += 1
        self.publisher.publish(ParametersReplaced())

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Write values into parameters and buffers, by name, and drop their optimizer state."""
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, value in values.items():
            tensors[name].copy_(value)
            for optimizer in self.optimizers:
                optimizer.state.pop(tensors[name], None)

    def _output(self) -> Tensor | None:
        """Output for the last batch in evaluation mode, or None; leaves no trace in the model."""
        seen = self.prunable.seen
        if seen is None:
            return None
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            self.model.eval()
            output = tensors_in(as_inputs(seen.inputs).call(self.model))
        finally:
            for module, mode in modes:
                module.training = mode
        numbers = [tensor.float().flatten() for tensor in output if tensor.is_floating_point()]
        return torch.cat(numbers) if numbers else None

    def see(self, inputs: Inputs, keep: bool) -> None:
        """Take inputs of the model as the example if there is none yet, and as the last batch if ``keep``.

        Raises:
            UserError: there is no tensor among them.
        """
        if self.prunable.example is None:
            self.prunable = replace(self.prunable, example=owned(first_of_batch(inputs, IMAGES)))
        if keep:
            kind = first_tensor(inputs).device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            self.prunable = replace(self.prunable, seen=SeenBatch(inputs.map(Tensor.detach), dtype))

    def check_seen(self, needed: bool) -> None:
        """Raise a UserError if a method needs the inputs of the model and none were seen."""
        if needed and self.prunable.example is None:
            raise UserError(
                "no forward pass of the network that was attached has been seen, so its channels cannot be "
                "followed: train that network itself, or give attach an example of its inputs"
            )

    def follow(self, average: nn.Module) -> None:
        """Mask, shrink, pack and unpack a copy of the model with it; see `Pruner.follow`."""
        module = unwrapped_average(average, self.model)
        if any(module is other for other in self.averages):
            return
        packed = {name: layer.structure.mask() for name, layer in self.moving.items()}
        catch_up_(module, self.model, self.plans, self.masks if self.frozen else packed)
        self.averages.append(module)

    def check_packable(self) -> None:
        """Look now at what cannot be packed at the hard prune, hours later: it trains masked and dense.

        Raises:
            UserError: that is all of the convolutions.
        """
        names = [layer.name for layer in self.prunable.convs]
        refusals = pack_refusals(self.model, names, self.optimizers)
        if not refusals:
            return
        name, reason = next(iter(refusals.items()))
        if len(refusals) == len(names):
            raise UserError(
                f"{name} cannot be packed: {reason}; set packed to false to train masked dense weights, "
                "or exclude the layer"
            )
        more = f", nor do {len(refusals) - 1} more" if len(refusals) > 1 else ""
        warnings.warn(f"{name} trains masked and dense, not packed: {reason}{more}", stacklevel=4)

    def finish(self, packed: bool) -> None:
        """Pack or unpack the finished network."""
        if self.packed and not packed:
            self._unpack()
        elif packed and not self.packed and self._masks:
            self._forget_unpackable_state()
            self.pack()
        elif packed and self.moving:
            for average in self.averages:
                settle_model_(average)
            settle_model_(self.model, self.optimizers)
            self._replaced()
        self.packed = packed and self.frozen
        if not self.packed:
            self._find_again()

    def _unpack(self) -> None:
        self._masks = dict(self.masks)
        unpack_model_(self.model, self.optimizers)
        for average in self.averages:
            unpack_model_(average)
        self._replaced()

    def pack(self, patterns: Mapping[str, Patterns] | None = None) -> list[str]:
        """Pack the layers with masks; with ``patterns`` those named, whose masks go on moving.

        Returns:
            Names of the layers packed.
        """
        dense = {name: mask for name, mask in self._masks.items() if mask is not None}
        if patterns is not None:
            dense = {name: mask for name, mask in dense.items() if name in patterns}
        refused = pack_refusals(self.model, dense, self.optimizers)
        linear = {layer.name for layer in self.prunable.linears}
        for name, reason in refused.items():
            if name in linear:  # of convolutions, `check_packable` has said so
                warnings.warn(f"{name} trains masked and dense, not packed: {reason}", stacklevel=2)
        masks = {name: mask for name, mask in dense.items() if name not in refused}
        if not masks:
            return []
        pack_model_(self.model, masks, self.optimizers, patterns or {})
        self._masks.update(dict.fromkeys(masks))
        for average in self.averages:
            pack_model_(average, masks, patterns=patterns or {})
            for name in masks:  # one index for both
                own, copy = self._packed_layer(name), average.get_submodule(name)
                if isinstance(copy, PackedLayer) and copy.structure.device == own.structure.device:
                    copy.structure = own.structure
        if patterns is not None:
            self._find_again()
            self.want_gradients(self.collecting)  # of what was dense, processes exchanged all of them
        self._replaced()
        return list(masks)

    def _forget_unpackable_state(self) -> None:
        """Drop optimizer state that cannot be packed; an optimizer that goes on starts it again."""
        for layer in self.prunable.layers:
            for optimizer in self.optimizers:
                state = optimizer.state.get(layer.weight, {})
                if odd_state(optimizer, state, layer.weight, factors=False):
                    del optimizer.state[layer.weight]

    def _find_again(self) -> None:
        """Look up the layers by name, because packing and unpacking replace modules."""
        layers = (replace(x, module=self.model.get_submodule(x.name)) for x in self.prunable.layers)
        self.prunable = replace(self.prunable, layers=tuple(layers))

    def state_dict(self) -> dict[str, Any]:
        """Plans and masks (one bit per weight); the loop saves weights and optimizer state."""
        return {
            "plans": [json.dumps(plan.to_json()) for plan in self.plans],
            "frozen": self.frozen,
            "packed": self.packed and self.frozen,
            "moving": {name: _as_lists(one.structure.patterns) for name, one in self.moving.items()},
            "masks": {name: bits_from_mask(mask) for name, mask in self.masks.items()},
        }

    def load_plans(self, documents: Sequence[str]) -> None:
        """Remove again what had been removed from the saved network."""
        for document in documents:
            plan = SurgeryPlan.from_json(json.loads(document))
            self.remove(plan)
            self.publisher.publish(ChannelsRemoved(plan))

    def load_masks(self, saved: Mapping[str, Any]) -> None:
        """Take over masks, after `load_plans`; the network is packed if the saved one was."""
        self.frozen = saved["frozen"]
        masks = {
            layer.name: mask_from_bits(saved["masks"][layer.name].to(layer.parameter.device), layer.shape)
            for layer in self.prunable.layers
            if layer.name in saved["masks"]
        }
        if self.frozen:
            self.packed = bool(saved["packed"])  # go on in the form that was saved
        packed = {name: tuple(map(tuple, known)) for name, known in saved.get("moving", {}).items()}
        if packed and packed == {name: one.structure.patterns for name, one in self.moving.items()}:
            self._index({name: masks[name] for name in packed})
            self._masks = {**masks, **dict.fromkeys(packed)}
            return
        if self.moving:
            self._unpack()
            self._find_again()
        self._masks = dict(masks)
        if packed:
            self.pack(packed)


def _as_lists(patterns: Patterns | None) -> list[list[int]]:
    return [list(one) for one in patterns or ()]
