"""The one place that changes a model: carry a surgery plan out on it and on its optimizers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clicktrain.errors import UserError
from clicktrain.formats.memory_format import keep_out_of_channels_last_
from clicktrain.graph.adapters import nearest_adapter
from clicktrain.graph.exchange import exchange_, exchanged, replace_module_, state_refusal
from clicktrain.surgery.layers import ChannelScatter, ChannelSelect, ConstantBatchNorm2d, RemovedConv2d
from clicktrain.surgery.plan import Cut, Gate, RemovedLayer, SurgeryPlan
from clicktrain.surgery.record import note_plan_

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def apply_surgery_(
    plan: SurgeryPlan, model: nn.Module, optimizers: Sequence[Optimizer] | Optimizer = ()
) -> None:
    """Shrink a model, its gradients and its optimizers' state per weight, all together.

    Parameters are exchanged for smaller ones, in the modules and, at the same places, in the optimizers'
    groups; attributes of parameters and hooks on them come along, and so do the hooks of modules. Whatever
    holds on to parameters otherwise has to be rebuilt (DistributedDataParallel, CUDA graphs). The same plan
    is applied to moving averages of the model, without optimizers. The model keeps the plan (`plans_of`), so
    that it can be saved.

    Everything is checked first: if it raises, nothing has been changed.

    Args:
        model: the module itself, not a wrapper around it.

    Raises:
        UserError: the plan does not fit the model, or an optimizer keeps a state that cannot shrink.
    """
    listed = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    old, gone = _checked(plan, model, listed)
    names = {id(tensor): name for name, tensor in reversed(old.items()) if plan.cuts_of(name)}
    with torch.no_grad():
        small = {key: _shrunken(plan, name, old[name]) for key, name in names.items()}
    for removed in plan.removed_layers:
        replace_module_(model, removed.name, _remnant(removed, model.get_submodule(removed.name)))
    for module in model.modules():
        tables = (module._parameters, module._buffers)
        if any(id(tensor) in small for table in tables for tensor in table.values()):
            for table in tables:
                for leaf, tensor in table.items():
                    if tensor is not None and id(tensor) in small:
                        table[leaf] = small[id(tensor)]  # type: ignore[assignment]
            follow_shape(module)
    for gate in plan.gates:
        _gate(model, gate)
    new = {old[name]: small[key] for key, name in names.items() if isinstance(old[name], nn.Parameter)}
    out = [old[name] for name in gone if isinstance(old[name], nn.Parameter)]
    exchange_(listed, new, lambda parameter, t: plan.shrink(names[id(parameter)], t), out)
    keep_out_of_channels_last_(model)
    note_plan_(model, plan)


@torch.no_grad()
def silence_(plan: SurgeryPlan, model: nn.Module) -> None:
    """Write zeros to the filters that a plan would cut, their biases, and the scale and shift behind them.

    The channels then carry zeros, and the plan changes nothing of what the network computes. What reads the
    channels stays as it is, as do shapes, buffers and optimizers.

    Raises:
        UserError: the plan does not fit the model.
    """
    tensors, _ = _checked(plan, model)
    modules = dict(model.named_modules(remove_duplicate=False))
    for cut in plan.cuts:
        tensor = tensors[cut.name]
        along = _out_axis(modules[cut.name.rpartition(".")[0]]) if tensor.dim() > 1 else 0
        if isinstance(tensor, nn.Parameter) and cut.dim == along:
            _zero_cut_(tensor, cut)


@torch.no_grad()
def zero_(plan: SurgeryPlan, model: nn.Module) -> None:
    """Write zeros to all parameters that a plan would take away, on both sides: made by and read from.

    The network then computes what the smaller one has to compute.

    Raises:
        UserError: the plan does not fit the model.
    """
    tensors, _ = _checked(plan, model)
    for cut in plan.cuts:
        if isinstance(tensor := tensors[cut.name], nn.Parameter):
            _zero_cut_(tensor, cut)
    for removed in plan.removed_layers:
        for name, parameter in model.get_submodule(removed.name).named_parameters():
            stays = removed.replacement == "constant" or (removed.replacement == "bias" and name == "bias")
            if not stays:
                parameter.zero_()


def _zero_cut_(tensor: Tensor, cut: Cut) -> None:
    gone = sorted(set(range(cut.size)) - set(cut.keep))
    tensor.index_fill_(cut.dim, torch.tensor(gone, dtype=torch.int64, device=tensor.device), 0.0)


def _out_axis(module: nn.Module) -> int:
    """The axis of a weight that outputs lie along."""
    adapter = nearest_adapter(module)
    return 0 if adapter is None else adapter.out_axis


def _shrunken(plan: SurgeryPlan, name: str, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return plan.shrink(name, tensor.detach())
    return exchanged(tensor, lambda old: plan.shrink(name, old))


def _checked(
    plan: SurgeryPlan, model: nn.Module, optimizers: Sequence[Optimizer] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """All parameters and buffers by all their names, and the names of those that go; UserError: no fit."""
    tensors: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    gone = [name for name in tensors if plan.new_name(name) is None]
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in (*(r.name for r in plan.removed_layers), *(g.name for g in plan.gates)):
        if not name or name not in modules:
            raise UserError(f"the plan was made for another network: there is no layer {name!r}")
    for removed in plan.removed_layers:
        module = modules[removed.name]
        conv = removed.replacement in ("zeros", "bias")
        expected = (nn.Conv2d,) if conv else (nn.BatchNorm2d, nn.SyncBatchNorm, nn.PReLU, ChannelSelect)
        if not isinstance(module, expected):
            raise UserError(
                f"the plan was made for another network: {removed.name} is a {type(module).__name__}"
            )
    for cut in plan.cuts:
        tensor = tensors.get(cut.name)
        if tensor is None or cut.name in gone:
            raise UserError(f"the plan was made for another network: there is no {cut.name}")
        ascending = all(a < b for a, b in zip(cut.keep, cut.keep[1:], strict=False))
        if not cut.keep or not ascending or cut.keep[0] < 0 or cut.keep[-1] >= cut.size:
            raise UserError(f"a cut of {cut.name} keeps no channels, or not in ascending order")
        if not 0 <= cut.dim < tensor.dim() or tensor.shape[cut.dim] != cut.size:
            raise UserError(
                f"the plan was made for another network: {cut.name} has shape {tuple(tensor.shape)}, "
                f"the plan cuts {cut.size} channels along dimension {cut.dim}"
            )
        reason = state_refusal(tensor, optimizers, "make the optimizer after surgery", factors=True)
        if reason is not None:
            raise UserError(f"{cut.name} cannot shrink: {reason}")
    for name, module in modules.items():
        _check_layer(plan, name, module, tensors)
    for gate in plan.gates:
        if not gate.channels or max(gate.channels) >= gate.size:
            raise UserError(f"the gate at {gate.name} selects channels that are not there")
    return tensors, gone


def _check_layer(plan: SurgeryPlan, name: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The tensors of one layer have to shrink alike."""
    prefix = f"{name}." if name else ""
    keeps = {(cut.name[len(prefix) :], cut.dim): cut.keep for cut in plan.cuts if cut.name.startswith(prefix)}
    outputs = _out_axis(module)
    if nearest_adapter(module) is not None:
        # Tied weights are cut under one of their names.
        both = f"{prefix}weight" in tensors and f"{prefix}bias" in tensors  # or the weight is computed
        alike = [("weight", outputs), ("bias", 0)] if both else []
    elif isinstance(module, (nn.modules.batchnorm._NormBase, ConstantBatchNorm2d)):
        leaves = ("weight", "bias", "running_mean", "running_var")
        alike = [(leaf, 0) for leaf in leaves if f"{prefix}{leaf}" in tensors]
    else:
        return
    first_names: dict[int, str] = {}
    for key, tensor in tensors.items():
        first_names.setdefault(id(tensor), key)
    own = [first_names[id(tensors[f"{prefix}{leaf}"])] for leaf, _ in alike]
    if own != [f"{prefix}{leaf}" for leaf, _ in alike]:
        return
    if len({keeps.get(key) for key in alike}) > 1 and plan.new_name(f"{prefix}weight") is not None:
        raise UserError(f"the plan does not cut the parameters of {name} alike")


def _remnant(removed: RemovedLayer, module: Any) -> nn.Module:
    """What takes the place of a removed layer, in the same mode."""
    new: nn.Module
    if removed.replacement == "constant":
        new = ConstantBatchNorm2d(module, writable=removed.writable)
    elif removed.replacement == "nothing":
        new = nn.Identity()
    else:
        bias = module.bias if removed.replacement == "bias" else None
        geometry = (module.kernel_size, module.stride, module.padding, module.dilation)
        new = RemovedConv2d(*geometry, bias, writable=removed.writable)
    return new.train(module.training)


def follow_shape(module: Any) -> None:
    """Set what a layer notes about its shape after its tensors."""
    if isinstance(module, _CONVS):
        filters, per_group = module.weight.shape[:2]
        # By the width that it had: where every group read one channel whole groups have gone (`flow`), and
        # a group that has come down to one channel may have lost filters, but no group has.
        if module.groups > 1 and module.in_channels == module.groups:
            module.groups = module.groups * filters // module.out_channels
        module.out_channels, module.in_channels = filters, per_group * module.groups
    elif isinstance(module, _TRANSPOSED):
        module.in_channels, module.out_channels = module.weight.shape[0], module.weight.shape[1]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.numel()
    elif isinstance(module, (nn.modules.batchnorm._NormBase, ConstantBatchNorm2d)):
        tensor: Any = module.running_mean if module.weight is None else module.weight
        module.num_features = tensor.numel()


def _gate(model: nn.Module, gate: Gate) -> None:
    layer = model.get_submodule(gate.name)
    kind = ChannelSelect if gate.kind == "select" else ChannelScatter
    if isinstance(layer, ChannelSelect):
        layer.channels = torch.tensor(gate.channels, dtype=torch.int64, device=layer.channels.device)
        layer.size = gate.size
        return
    tensor = next(iter((*layer.parameters(), *layer.buffers())), None)
    module = kind(gate.channels, gate.size, None if tensor is None else tensor.device)
    inner = [("select", module), ("layer", layer)]
    parts = inner if gate.kind == "select" else [("layer", layer), ("scatter", module)]
    wrapped = nn.Sequential(OrderedDict(parts))
    wrapped.training = module.training = layer.training
    replace_module_(model, gate.name, wrapped)
