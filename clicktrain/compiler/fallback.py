"""Layer by layer, for what cannot be traced: each packed convolution for itself, between two conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clicktrain.compiler.measure import take_turns
from clicktrain.compiler.select import DENSITY_LIMIT
from clicktrain.compiler.trace import undisturbed
from clicktrain.kernels.native import KernelError
from clicktrain.kernels.native.failure import report_failure
from clicktrain.kernels.sparse_conv2d import PackedConv2d, sparse_conv2d

_SECONDS = 0.3


def accelerate_layers_(model: nn.Module, inputs: tuple[Any, ...], rule: str, below: str = "") -> list[str]:
    """Switch packed convolutions to the blocked implementation where that pays.

    Args:
        model: run once on the inputs, to see what each layer gets.
        inputs: of the model.
        rule: as of `accelerate`; by ``measured`` a layer's conversions are part of its time.
        below: path of the only part to look at.

    Returns:
        Names of the layers switched.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedConv2d) and (not below or f"{name}.".startswith(f"{below}."))
    }
    shapes = _input_shapes(model, layers, inputs)
    chosen = []
    # Measuring draws random numbers; training goes on with its own.
    with torch.random.fork_rng(devices=[]):
        for name, layer in layers.items():
            if name in shapes and _works(layer, shapes[name]) and _pays(layer, shapes[name], rule):
                layer.use("blocked", otherwise="reference")
                chosen.append(name)
    return chosen


@torch.no_grad()
def _input_shapes(
    model: nn.Module, layers: dict[str, PackedConv2d], inputs: tuple[Any, ...]
) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            if isinstance(args[0], Tensor) and args[0].dim() == 4:
                shapes[name] = args[0].shape

        return see

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with undisturbed(model):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _works(layer: PackedConv2d, shape: torch.Size) -> bool:
    """Whether the layer's kernels can be built; who watches failures is told if not."""
    try:
        _call(layer, shape, "blocked")()
    except KernelError as error:
        report_failure(error)
        return False
    return True


def _pays(layer: PackedConv2d, shape: torch.Size, rule: str) -> bool:
    if rule == "sparse":
        return True
    if rule == "density":
        return layer.structure.density < DENSITY_LIMIT
    ms = take_turns({impl: _call(layer, shape, impl) for impl in ("reference", "blocked")}, _SECONDS)
    return ms["blocked"] < ms["reference"]


def _call(layer: PackedConv2d, shape: torch.Size, impl: str) -> Callable[[], object]:
    """Forward and backward of a layer on random numbers."""
    x = torch.randn(shape, dtype=layer.values.dtype, requires_grad=True)
    values = layer.values.detach().requires_grad_()

    def step() -> object:
        with torch.enable_grad():
            y = sparse_conv2d(
                x,
                values,
                layer.structure,
                layer.bias,
                stride=layer.stride,
                padding=layer.padding,
                dilation=layer.dilation,
                groups=layer.groups,
                impl=impl,
            )
        return torch.autograd.grad(y.sum(), [x, values])

    return step
