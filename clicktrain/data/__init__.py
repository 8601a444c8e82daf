"""Images and labels: where they come from, and how they reach the training step."""

from clicktrain.data.augment import Augment, Policy
from clicktrain.data.draws import WHOLE, Part, seeded_generator
from clicktrain.data.fingerprints import fingerprint
from clicktrain.data.image_data import EncodedSource, ImageData, PixelSource, Source
from clicktrain.data.loader import Batch, Loader
from clicktrain.data.making import make_loader
from clicktrain.data.mixing import Mixing, cutmix, mixup
from clicktrain.data.opening import open_data
from clicktrain.data.policies import RandAugment, TrivialAugment
from clicktrain.data.shards.source import ShardSource
from clicktrain.data.spec import DataSpec

__all__ = [
    "WHOLE",
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
    "ShardSource",
    "Source",
    "TrivialAugment",
    "cutmix",
    "fingerprint",
    "make_loader",
    "mixup",
    "open_data",
    "seeded_generator",
]
