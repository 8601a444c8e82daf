"""The networks of the papers, written for tracing, channel surgery and any size of image."""

from clicktrain.models.cifarnet import CifarNet
from clicktrain.models.layers import Stem, scaled_channels
from clicktrain.models.mobilenet import MobileNetV1
from clicktrain.models.mobilenet_v3 import MobileNetV3
from clicktrain.models.registry import create_model, list_models, min_image_size
from clicktrain.models.resnet import ResNet
from clicktrain.models.user_factory import call_factory
from clicktrain.models.vgg import VGG

__all__ = [
    "VGG",
    "CifarNet",
    "MobileNetV1",
    "MobileNetV3",
    "ResNet",
    "Stem",
    "call_factory",
    "create_model",
    "list_models",
    "min_image_size",
    "scaled_channels",
]
