"""The time that a network with masks will take on the operators that the compiler chooses for it."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from clicktrain.compiler import accelerate
from clicktrain.graph import as_inputs
from clicktrain.graph.batch import blank
from clicktrain.kernels.pack_model import pack_model_, pack_refusals
from clicktrain.latency.channels import Measured, bare_copy
from clicktrain.latency.sparse_times import Timed
from clicktrain.methods.patterns.latency import network_times


class MaskedLatency:
    """Measures copies of a network, one dense and one pruned, packed and accelerated (ClickTrain 5.4).

    For ``attach(..., measure=MaskedLatency(model, example))``: a latency target is then met as measured. The
    network itself stays as it is.
    """

    def __init__(self, model: nn.Module, example: Any) -> None:
        """Of this network.

        Args:
            model: on the CPU; packed convolutions are not allowed yet.
            example: its inputs, [N, C, H, W] for images, whose sizes count.
        """
        self.model, self.example = model, example

    def __call__(self, masks: Mapping[str, Tensor], batch: int, timed: Timed) -> Measured:
        """Milliseconds of a batch of the dense copy and of the accelerated one, taking turns.

        Args:
            masks: layer name -> bool [F, C, R, S], True = kept. Layers that cannot be packed stay dense.
            batch: images.
            timed: ``inference``, or the forward and backward pass of a training ``step``.
        """
        dense, pruned = bare_copy(self.model), bare_copy(self.model)
        refused = pack_refusals(pruned, masks)
        pack_model_(pruned, {name: mask for name, mask in masks.items() if name not in refused})
        inputs = blank(as_inputs(self.example, self.model), batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run says it when it accelerates the real network
            fast = accelerate(pruned, inputs)
        times = network_times({"dense": dense, "pruned": fast}, inputs, batch, timed)
        ratios = [after / before for before, after in zip(times["dense"], times["pruned"], strict=True)]
        return Measured(min(times["dense"]), min(times["pruned"]), statistics.median(ratios))
