"""Layers and functions of PyTorch that have a kernel as an activation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from clicktrain.kernels.activations import NONE, Activation
from clicktrain.kernels.activations.in_torch import in_torch as in_torch

RELU = Activation("relu")
RELU_FUNCTIONS = (F.relu, torch.relu)


def activation_of_layer(layer: nn.Module) -> Activation:
    """The kernel's activation for a layer; ``none`` if there is none."""
    if type(layer) is nn.ReLU:
        return RELU
    if isinstance(layer, nn.Hardtanh) and type(layer) in (nn.Hardtanh, nn.ReLU6):
        return _clamp(layer.min_val, layer.max_val)
    if type(layer) is nn.LeakyReLU:
        return _leaky(layer.negative_slope)
    if type(layer) is nn.GELU:
        return _gelu(layer.approximate)
    return {nn.SiLU: Activation("silu"), nn.Hardswish: Activation("hardswish")}.get(type(layer), NONE)


def activation_of_function(node: fx.Node) -> Activation:
    """The kernel's activation for a call of a function; ``none`` if there is none."""
    target = node.target
    if target in RELU_FUNCTIONS:
        return RELU
    if target is F.relu6:
        return _clamp(0.0, 6.0)
    if target is F.leaky_relu:
        slope = argument(node, 1, "negative_slope")
        return _leaky(0.01 if slope is None else slope)
    if target is F.gelu:
        return _gelu(node.kwargs.get("approximate", "none"))
    if target is F.silu:
        return Activation("silu")
    return Activation("hardswish") if target is F.hardswish else NONE


def _clamp(low: Any, high: Any) -> Activation:
    numbers = isinstance(low, (int, float)) and isinstance(high, (int, float))
    return Activation("clamp", float(low), float(high)) if numbers and low <= high else NONE


def _leaky(slope: Any) -> Activation:
    positive = isinstance(slope, (int, float)) and slope > 0
    return Activation("leaky", float(slope)) if positive else NONE


def _gelu(approximate: Any) -> Activation:
    names = {"none": "gelu", "tanh": "gelu_tanh"}
    return Activation(names[approximate]) if approximate in names else NONE


def argument(node: fx.Node, place: int, name: str) -> Any:
    """An argument of a call, by its place or name; None if it is not given."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)
