"""Images and labels: where they come from, and how they reach the training step."""

from clicktrain.data.augment import Augment, Part, Policy, seeded_generator
from clicktrain.data.image_data import EncodedSource, ImageData, PixelSource, Source
from clicktrain.data.loader import Batch, Loader
from clicktrain.data.mixing import Mixing, cutmix, mixup
from clicktrain.data.opening import open_data
from clicktrain.data.policies import RandAugment, TrivialAugment
from clicktrain.data.spec import DataSpec
from clicktrain.data.streaming import make_loader

__all__ = [
    "Augment",
    "Batch",
    "DataSpec",
    "EncodedSource",
    "ImageData",
    "Loader",
    "Mixing",
    "Part",
    "PixelSource",
    "Policy",
    "RandAugment",
    "Source",
    "TrivialAugment",
    "cutmix",
    "make_loader",
    "mixup",
    "open_data",
    "seeded_generator",
]
