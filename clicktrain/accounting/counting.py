"""Counting: one forward pass of the network itself, watched by hooks, that leaves no trace."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.accounting.cost import LayerCost, ModelCost, ratio
from clicktrain.accounting.watching import Traffic, no_trace, plain
from clicktrain.errors import UserError
from clicktrain.formats.packed import Structure
from clicktrain.graph.adapters import dense_adapter
from clicktrain.graph.inputs import Inputs, as_inputs, batch_size, first_tensor
from clicktrain.graph.trace import force_eager


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """A module with a weight. ``identity`` is the same for modules that share it."""

    name: str
    module: nn.Module
    kind: str
    shape: tuple[int, ...]
    nonzero: int
    identity: int

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


@dataclass(slots=True)
class _Calls:
    """Sums over the calls of one layer: uses of each weight, over the whole batch, in the three passes."""

    output_hw: tuple[int, ...] = ()
    forward: int = 0
    grad_input: int = 0
    grad_weight: int = 0


def count(model: nn.Module, example: Any, masks: Mapping[str, Tensor] | None = None) -> ModelCost:
    """Count weights, FLOPs and bytes of a network, per image.

    Layers are those with a `LayerAdapter` and packed ones; weights that are used without such a module are
    not seen. What needs a gradient follows from the data flow: a layer whose input depends on nothing trained
    (the first one) has no dgrad. The forward pass runs in evaluation mode; mode, buffers, gradients and
    random state are afterwards as before.

    Args:
        model: the network; a compiled one is counted as it was before.
        example: batch of inputs on the model's device: a tensor, [N, C, H, W] for images, a tuple of
            positional arguments or a dict of keyword arguments.
        masks: layer name -> bool mask of its weight, True = kept. Layers without one then count as dense.
            None: what is exactly zero counts as pruned.

    Raises:
        UserError: a mask fits no layer, or the example has no images.
    """
    model = plain(model)
    inputs = as_inputs(example, model)
    batch = batch_size(inputs)
    if batch < 1:
        shape = tuple(first_tensor(inputs).shape)
        raise UserError(f"counting needs at least one image, got an example of shape {shape}")
    calls, traffic = _watch(model, inputs)
    layers = _layers(model, masks)
    by_module = {id(layer.module): layer for layer in layers}
    unique = {layer.identity: layer for layer in layers}.values()
    pruned = sum(layer.weights - layer.nonzero for layer in unique)
    convs = _counted(unique)
    parameters = _parameters(model)
    return ModelCost(
        layers=tuple(_cost(by_module[key], seen, batch) for key, seen in calls.items()),
        parameters=parameters,
        nonzero_parameters=parameters - pruned,
        conv_weights=sum(layer.weights for layer in convs),
        conv_nonzero=sum(layer.nonzero for layer in convs),
        batch_norm_bytes=traffic["batch_norm"] // batch,
        activation_bytes=traffic["activation"] // batch,
        pooling_bytes=traffic["pooling"] // batch,
    )


def compression_ratio(model: nn.Module) -> float:
    """All convolution weights / nonzero convolution weights (ClickTrain section 6.2), shared weights once.

    Of a network without convolutions, over the weights of its linear layers. Where no weight is left, as if
    one were. Channels that were removed are in neither number: compare with `count` of the original network.
    """
    convs = _counted({layer.identity: layer for layer in _layers(plain(model), None)}.values())
    return ratio(sum(layer.weights for layer in convs), sum(layer.nonzero for layer in convs))


def _counted(layers: Iterable[_Layer]) -> list[_Layer]:
    """The layers that compression is over: convolutions, or all of a network without convolutions."""
    return [layer for layer in layers if layer.kind == "conv"] or list(layers)


def _structure(module: nn.Module) -> Structure | None:
    """The positions of a packed layer's values; None for another module."""
    structure = getattr(module, "structure", None)
    return structure if isinstance(structure, Structure) else None


def _layers(model: nn.Module, masks: Mapping[str, Tensor] | None) -> list[_Layer]:
    layers = []
    for name, module in model.named_modules():
        adapter = dense_adapter(module)
        if adapter is not None:
            layers.append(_layer(name, module, adapter.kind, masks))
    unknown = sorted(set(masks or ()) - {layer.name for layer in layers})
    if unknown:
        raise UserError(
            f"there are masks for {', '.join(unknown)}, which are no convolution or linear layers"
        )
    return layers


def _layer(name: str, module: nn.Module, kind: str, masks: Mapping[str, Tensor] | None) -> _Layer:
    structure = _structure(module)
    if structure is not None:
        values = module.values
        assert isinstance(values, Tensor)
        return _Layer(name, module, kind, structure.shape, structure.nnz, id(values))
    weight = module.weight
    assert isinstance(weight, Tensor)
    shape, mask = tuple(weight.shape), (masks or {}).get(name)
    if mask is not None and tuple(mask.shape) != shape:
        raise UserError(f"the mask of {name} is of shape {tuple(mask.shape)}, its weight of {shape}")
    nonzero = weight.numel()
    if mask is not None:
        nonzero = int(mask.sum())
    elif masks is None:
        nonzero = int(weight.detach().count_nonzero())
    own = module._parameters.get("weight")  # a parametrization recomputes its weight
    return _Layer(name, module, kind, shape, nonzero, id(module if own is None else own))


def _parameters(model: nn.Module) -> int:
    packed = (structure for module in model.modules() if (structure := _structure(module)) is not None)
    return sum(p.numel() for p in model.parameters()) + sum(s.numel - s.nnz for s in packed)


def _watch(model: nn.Module, inputs: Inputs) -> tuple[dict[int, _Calls], Mapping[str, int]]:
    """Run the network once; calls by the identity of the module, and bytes moved."""
    calls: dict[int, _Calls] = {}

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        seen, adapter = calls.setdefault(id(module), _Calls()), dense_adapter(module)
        assert adapter is not None
        seen.output_hw, positions = adapter.weight_uses(module, x, output)
        seen.forward += positions
        if output.requires_grad:  # not under no_grad
            seen.grad_input += positions if x.requires_grad else 0
            weight = module.weight if _structure(module) is None else module.values
            seen.grad_weight += positions if weight.requires_grad else 0

    with contextlib.ExitStack() as hooks:
        for module in model.modules():
            if dense_adapter(module) is not None:
                hooks.enter_context(module.register_forward_hook(note, with_kwargs=True))
        # Gradients are enabled, although none is computed: who needs one is read off the tensors.
        with (
            no_trace(model, inputs, training=False),
            force_eager(),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            plainly = inputs.map(lambda x: x.clone() if x.is_inference() else x.detach())
            with Traffic() as traffic:
                plainly.call(model)
    return calls, traffic.bytes


def _cost(layer: _Layer, calls: _Calls, batch: int) -> LayerCost:
    def flops(positions: int) -> tuple[int, int]:
        """With all weights, and with the nonzero ones."""
        return 2 * layer.weights * positions // batch, 2 * layer.nonzero * positions // batch

    sizes = (layer.shape, calls.output_hw, layer.weights, layer.nonzero)
    passes = (*flops(calls.forward), *flops(calls.grad_input), *flops(calls.grad_weight))
    return LayerCost(layer.name, layer.kind, *sizes, *passes)
