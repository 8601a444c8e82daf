"""The network that every engine runs: random weights and positions, norms with statistics of their own."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clicktrain.bench.masks import model_masks
from clicktrain.errors import UserError
from clicktrain.kernels.pack_model import pack_model_, unpack_model_
from clicktrain.models import create_model

CLASSES = 10


@dataclass(frozen=True, slots=True)
class InferenceCase:
    """A network at one compression; the same weights, positions and images whenever it is asked for.

    Attributes:
        model: name in the zoo, or ``package.module:factory``; a CIFAR stem is used up to 64 pixels.
        compression: all weights of the pruned layers over kept ones.
        group: neighboring filters that share their positions.
        image_size: side of the images in pixels.
        seed: of weights, positions and images.
    """

    model: str = "resnet18"
    compression: float = 10.0
    group: int = 1
    image_size: int = 32
    seed: int = 0

    def networks(self) -> Networks:
        """The packed network, and the same one with zeros in dense weights; in evaluation mode."""
        torch.manual_seed(self.seed)
        stem = "cifar" if self.image_size <= 64 else "imagenet"
        model = create_model(self.model, num_classes=CLASSES, stem=stem)
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
        masks = model_masks(model, self.compression, self.group, self.seed)
        if not masks:
            raise UserError(f"{self.model} has no convolution that could be packed")
        pack_model_(model, masks)
        dense = copy.deepcopy(model)
        unpack_model_(dense)
        return Networks(self, model.eval(), dense.eval())

    def images(self, batch: int) -> Tensor:
        """Images [batch, 3, H, W]."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(batch, 3, self.image_size, self.image_size, generator=generator)


@dataclass
class Networks:
    """One network in the forms that engines take.

    Attributes:
        packed, dense: the same network; both in evaluation mode.
        files: what was written from it, by kind, so that it is written once.
    """

    case: InferenceCase
    packed: nn.Module
    dense: nn.Module
    files: dict[str, Path] = field(default_factory=dict)

    @torch.inference_mode()
    def exact(self, x: Tensor) -> Tensor:
        """Outputs in float64."""
        result: Tensor = copy.deepcopy(self.dense).double()(x.double())
        return result
