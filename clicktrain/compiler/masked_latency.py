"""The time of a network with masks on the operators that the compiler chooses for it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from clicktrain.compiler.api import accelerate
from clicktrain.graph import as_inputs
from clicktrain.graph.inputs import blank
from clicktrain.kernels.pack_model import pack_model_, pack_refusals
from clicktrain.latency.network_times import Measured, Timed, bare_copy, network_times


class MaskedLatency:
    """Measures copies of a network, one dense and one pruned, packed and accelerated (ClickTrain 5.4).

    For ``attach(..., measure=MaskedLatency(model, example))``: a latency target is then met as measured.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        """Keep the network; only copies of it are changed.

        Args:
            model: on the CPU, without packed convolutions.
            example: its inputs, [N, C, H, W] for images; sizes count.
        """
        self.model, self.example = model, example

    def __call__(self, masks: Mapping[str, Tensor], batch: int, timed: Timed) -> Measured:
        """Milliseconds of a batch of the dense copy and of the accelerated one, taking turns.

        Args:
            masks: layer name -> bool of the weight's shape, True = kept. Layers that cannot be packed stay
                dense.
            batch: images.
            timed: what counts.
        """
        dense, pruned = bare_copy(self.model), bare_copy(self.model)
        refused = pack_refusals(pruned, masks)
        pack_model_(pruned, {name: mask for name, mask in masks.items() if name not in refused})
        inputs = blank(as_inputs(self.example, self.model), batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run warns when it accelerates the real network
            fast = accelerate(pruned, inputs)
        return Measured.of(*network_times([dense, fast], inputs, batch, timed))
