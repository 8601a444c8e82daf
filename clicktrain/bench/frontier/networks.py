"""The networks of a frontier that are timed: dense ones by width, and those that runs have pruned."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clicktrain.bench.frontier.lines import Line
from clicktrain.bench.frontier.recipe import Cell
from clicktrain.bench.frontier.structure import similar_masks
from clicktrain.bench.frontier.trainer_steps import (
    ENDLESS,
    STEPS_PER_EPOCH,
    GivenMasks,
    TrainerSteps,
    drawn_images,
)
from clicktrain.bench.runs import LAYOUTS, network_call, safe_layouts
from clicktrain.bench.timing import autocast
from clicktrain.compiler import accelerate, dtypes_worth_measuring
from clicktrain.kernels.pack_model import pack_model_
from clicktrain.methods import Dense, Method
from clicktrain.models import create_model
from clicktrain.sparsity.masks import conv_masks
from clicktrain.train.augmentation import SMALL_IMAGE
from clicktrain.train.config import Precision, RunConfig

LATENCY_BATCHES = (64, 1)

_OF_A_STEP = (
    "model", "width", "stem", "image_size", "batch_size", "accumulate", "optimizer", "momentum", "nesterov",
    "mixup", "cutout", "augment", "ema_decay", "lookahead", "clip_grad_norm", "whitening", "threads",
    "label_smoothing",
)  # fmt: skip
"""Settings that the time of a dense step depends on, beside the images."""
_OF_A_STEP_AT_TIMES = (
    "cutmix", "mix_probability", "auto_augment", "randaugment_operations", "randaugment_magnitude",
    "randaugment_deviation", "randaugment_probability", "erasing", "erasing_fill", "augment_repeats", "loss",
    "layer_decay", "layer_rates",
)  # fmt: skip
"""Further ones, which count where they are not at their defaults: the keys of earlier times stay."""


@dataclass(frozen=True)
class Engine:
    """A way to run a network in PyTorch: precision, memory order, whether compiled."""

    precision: Precision = "fp32"
    layout: Literal["NCHW", "channels_last"] = "NCHW"
    compiled: bool = False

    def __str__(self) -> str:
        return " ".join([self.precision, self.layout, *(["compile"] if self.compiled else [])])


@dataclass(frozen=True, eq=False)
class Network:
    """A dense network, or one with frozen masks, in the run that it is trained in.

    Attributes:
        key: the same for runs with the same steps.
        config: of the run, with drawn images.
        facts: of its data, ``classes`` and ``image_shape``.
        masks: layer name -> bool mask; empty for a dense network.
    """

    key: str
    config: RunConfig
    facts: Mapping[str, Any]
    masks: Mapping[str, Tensor]

    def module(self) -> nn.Module:
        """The plain network, with fresh weights and zeros outside the masks."""
        torch.manual_seed(0)
        channels, *size = self.facts["image_shape"]
        stem = self.config.stem
        if stem == "auto":
            stem = "cifar" if max(size) <= SMALL_IMAGE else "imagenet"
        model = create_model(
            self.config.model, num_classes=self.facts["classes"], in_channels=channels,
            width=self.config.width, stem=stem,
        )  # fmt: skip
        with torch.no_grad():
            for name, mask in self.masks.items():
                model.get_submodule(name).weight.mul_(mask)  # type: ignore[operator]
        return model

    def images(self, batch: int) -> Tensor:
        """A batch of images."""
        return torch.randn(batch, *self.facts["image_shape"], generator=torch.Generator().manual_seed(0))

    def steps(self, engine: Engine) -> TrainerSteps:
        """Its training, as the trainer does it; of a pruned network on fast operators, planned here."""
        config = replace(
            self.config, precision=engine.precision, channels_last=engine.layout == "channels_last",
            compile=engine.compiled,
        )  # fmt: skip
        method: Method[Any] = GivenMasks(masks=self.masks) if self.masks else Dense()
        steps = TrainerSteps(config, method)
        if self.masks:
            steps.step()  # masks are frozen after it
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the run itself has warned
                _ = steps.accelerated
        return steps

    def engines(self, kinds: tuple[str, ...]) -> list[Engine]:
        """The engines, of these kinds, that train it; not compiled ones."""
        layouts = safe_layouts(self.module())
        return [
            Engine(precision, layout)  # type: ignore[arg-type]
            for precision in kinds if precision != "compile" for layout in layouts
        ]  # fmt: skip

    def inference(self, engine: Engine, batch: int) -> Callable[[], object]:
        """A call that predicts a batch in PyTorch."""
        model, x = self.module().eval(), self.images(batch)
        if engine.compiled:
            model.compile(dynamic=False)
        y = torch.zeros(batch, dtype=torch.long)
        return network_call(model, x, y, engine.layout, engine.precision == "bf16", False)

    def fast_inference(self, bf16: bool, batch: int) -> Callable[[], object] | None:
        """A call that predicts a batch on the sparse kernels; None where nothing can be accelerated."""
        masks, rule = conv_masks(self.masks), self.config.operators
        if not masks or rule == "reference":
            return None
        packed, x = copy.deepcopy(self.module()), self.images(batch)
        pack_model_(packed, masks)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast = accelerate(packed, x, rule=rule, dtypes=dtypes_worth_measuring(bf16)).eval()

        def predict() -> None:
            with torch.inference_mode(), autocast(bf16):
                fast(x)

        return predict


def inference_engines(kinds: tuple[str, ...]) -> list[Engine]:
    """The engines, of these kinds, that a network can predict in; not compiled ones."""
    return [
        Engine(precision, layout)  # type: ignore[arg-type]
        for precision in kinds if precision != "compile" for layout in LAYOUTS
    ]  # fmt: skip


def dense_network(cell: Cell, line: Line) -> Network:
    """The network of a cell before anything is removed from it; ``line`` is of one of its runs."""
    config, facts = _config(cell, line)
    about = {name: getattr(config, name) for name in _OF_A_STEP}
    plain = RunConfig()
    later = {name: getattr(config, name) for name in _OF_A_STEP_AT_TIMES}
    about |= {name: value for name, value in later.items() if value != getattr(plain, name)}
    about["images"] = facts["image_shape"], facts["classes"]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:8]
    key = f"{config.model} w{config.width:g} b{config.batch_size} {digest}"
    return Network(key, replace(config, distill=0.0), facts, {})


def pruned_network(cell: Cell, line: Line) -> Network:
    """The network that a run has pruned, with masks that look like its own."""
    config, facts = _config(cell, line)
    if line.get("rule"):
        config = replace(config, operators=line["rule"])
    return Network(cell.name, config, facts, similar_masks(line["structure"]))


def _config(cell: Cell, line: Line) -> tuple[RunConfig, Mapping[str, Any]]:
    config, _ = cell.config(line["seed"])
    facts = line["network"]
    timed = replace(drawn_images(config, facts, STEPS_PER_EPOCH), epochs=ENDLESS, method="dense")
    return timed, facts
