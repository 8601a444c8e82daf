"""Images and labels: where they come from, and how they reach the training step."""

from clicktrain.data.augment import Augment, Part, mixup, seeded_generator
from clicktrain.data.image_data import EncodedSource, ImageData, PixelSource, Source
from clicktrain.data.loader import Batch, Loader
from clicktrain.data.making import make_loader
from clicktrain.data.opening import open_data
from clicktrain.data.shards.source import ShardSource
from clicktrain.data.spec import DataSpec

__all__ = [
    "Augment",
    "Batch",
    "DataSpec",
    "EncodedSource",
    "ImageData",
    "Loader",
    "Part",
    "PixelSource",
    "ShardSource",
    "Source",
    "make_loader",
    "mixup",
    "open_data",
    "seeded_generator",
]
