"""The numbers as data. FLOPs are 2 x multiply-adds, exact, per image; bias additions are not counted.

Every layer has three passes in training, each of which costs the same: forward, dgrad (``grad_input``) and
wgrad (``grad_weight``). ``_dense`` is the cost of all weights, the other one that of the nonzero ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One convolution or linear layer.

    Attributes:
        weight_shape: [F, C, R, S] of the dense weight, or [F, C].
        output_hw: spatial size of the output of the last call, () for linear layers.
        forward_flops_dense, forward_flops: of all calls in one forward pass, padding taps included.
        grad_input_flops_dense, grad_input_flops: 0 if what the layer reads depends on nothing trained.
        grad_weight_flops_dense, grad_weight_flops: 0 if the layer is not trained.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    output_hw: tuple[int, ...]
    weights: int
    nonzero: int
    forward_flops_dense: int
    forward_flops: int
    grad_input_flops_dense: int
    grad_input_flops: int
    grad_weight_flops_dense: int
    grad_weight_flops: int

    @property
    def density(self) -> float:
        """Nonzero weights / all weights."""
        return self.nonzero / max(self.weights, 1)

    @property
    def training_flops_dense(self) -> int:
        """The three passes with all weights."""
        return self.forward_flops_dense + self.grad_input_flops_dense + self.grad_weight_flops_dense

    @property
    def training_flops(self) -> int:
        """The three passes with the nonzero weights."""
        return self.forward_flops + self.grad_input_flops + self.grad_weight_flops


@dataclass(frozen=True, slots=True)
class ModelCost:
    """A network on images of one size. Made by `count`.

    Attributes:
        layers: convolution and linear layers that the forward pass calls, in the order of their first call.
        parameters: all parameters, those that are not stored because they are pruned included.
        conv_weights, conv_nonzero: of all convolutions, called or not, shared weights once; of the linear
            layers in a network without convolutions.
        batch_norm_bytes, activation_bytes, pooling_bytes: read and written by one forward pass, per image, in
            the example's dtype; each input once and each output once.
    """

    layers: tuple[LayerCost, ...]
    parameters: int
    nonzero_parameters: int
    conv_weights: int
    conv_nonzero: int
    batch_norm_bytes: int = 0
    activation_bytes: int = 0
    pooling_bytes: int = 0

    @property
    def compression_ratio(self) -> float:
        """All convolution weights / nonzero convolution weights (ClickTrain section 6.2).

        Where no weight is left, as if one were.
        """
        return ratio(self.conv_weights, self.conv_nonzero)

    @property
    def forward_flops_dense(self) -> int:
        """Inference with all weights."""
        return sum(layer.forward_flops_dense for layer in self.layers)

    @property
    def forward_flops(self) -> int:
        """Inference with the nonzero weights."""
        return sum(layer.forward_flops for layer in self.layers)

    @property
    def inference_flops_ratio(self) -> float:
        """Inference FLOPs / those of the dense network; 0.6 = 40% saved."""
        return self.forward_flops / max(self.forward_flops_dense, 1)

    @property
    def training_flops_dense(self) -> int:
        """A training step on one image while everything is dense."""
        return sum(layer.training_flops_dense for layer in self.layers)

    @property
    def training_flops(self) -> int:
        """A training step on one image of packed layers, or once masks are frozen."""
        return sum(layer.training_flops for layer in self.layers)

    def training_flops_per_image(self, frozen: bool) -> int:
        """A training step on one image.

        Before masks are frozen every pass of layers that are not packed is dense: a pruned weight may come
        back, so its gradient is needed.
        """
        return self.training_flops if frozen else self.training_flops_dense

    def layer(self, name: str) -> LayerCost:
        """The layer of that name; KeyError if there is none."""
        return {layer.name: layer for layer in self.layers}[name]


def moved(cost: ModelCost, nonzero: Mapping[str, int]) -> ModelCost:
    """What `count` found, once these layers, by name, have as many nonzero weights."""
    layers, gained, conv_gained = [], 0, 0
    for layer in cost.layers:
        now = nonzero.get(layer.name, layer.nonzero)
        gained += now - layer.nonzero
        conv_gained += now - layer.nonzero if layer.kind == "conv" else 0
        layers.append(
            replace(
                layer,
                nonzero=now,
                forward_flops=layer.forward_flops_dense * now // layer.weights,
                grad_input_flops=layer.grad_input_flops_dense * now // layer.weights,
                grad_weight_flops=layer.grad_weight_flops_dense * now // layer.weights,
            )
        )
    convs = any(layer.kind == "conv" for layer in cost.layers)
    return replace(
        cost,
        layers=tuple(layers),
        nonzero_parameters=cost.nonzero_parameters + gained,
        conv_nonzero=cost.conv_nonzero + (conv_gained if convs else gained),
    )


def ratio(weights: int, nonzero: int) -> float:
    """Compression ratio of some weights; 1.0 if there are none, and a number if none of them is left."""
    return weights / max(nonzero, 1) if weights else 1.0
