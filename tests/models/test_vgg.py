import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clicktrain.models import create_model

# torchvision's vgg*_bn: N of features.N for each convolution, and the filters there.
CONVOLUTIONS = {
    "vgg11": ([0, 4, 8, 11, 15, 18, 22, 25], [64, 128, 256, 256, 512, 512, 512, 512]),
    "vgg13": ([0, 3, 7, 10, 14, 17, 21, 24, 28, 31], [64, 64, 128, 128, 256, 256, 512, 512, 512, 512]),
    "vgg16": (
        [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40],
        [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512],
    ),
}
NAMES = list(CONVOLUTIONS)


def feature_entries(name):
    result, channels = [], 3
    for index, filters in zip(*CONVOLUTIONS[name], strict=True):
        result += [
            (f"features.{index}.weight", (filters, channels, 3, 3)),
            (f"features.{index}.bias", (filters,)),
        ]
        for vector in ("weight", "bias", "running_mean", "running_var"):
            result.append((f"features.{index + 1}.{vector}", (filters,)))
        result.append((f"features.{index + 1}.num_batches_tracked", ()))
        channels = filters
    return result


def entries(model):
    return [(key, tuple(value.shape)) for key, value in model.state_dict().items()]


def on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **{"num_classes": 1000, **options})


@pytest.mark.parametrize(
    ("name", "count", "giga_macs"),
    [("vgg11", 132_868_840, 7.609), ("vgg13", 133_053_736, 11.308), ("vgg16", 138_365_992, 15.470)],
)
def test_imagenet_network_is_that_of_torchvision(name, count, giga_macs):
    model = on_meta(name)
    head = [
        ("classifier.0.weight", (4096, 25088)),
        ("classifier.0.bias", (4096,)),
        ("classifier.3.weight", (4096, 4096)),
        ("classifier.3.bias", (4096,)),
        ("classifier.6.weight", (1000, 4096)),
        ("classifier.6.bias", (1000,)),
    ]
    assert entries(model) == feature_entries(name) + head
    assert sum(p.numel() for p in model.parameters()) == count
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga_macs, abs=0.0006)


@pytest.mark.parametrize("name", NAMES)
def test_cifar_network_has_one_linear_layer_on_512_features(name):
    head = [("classifier.weight", (10, 512)), ("classifier.bias", (10,))]
    assert entries(on_meta(name, num_classes=10, stem="cifar")) == feature_entries(name) + head


@pytest.mark.parametrize(
    ("size", "grids"),
    [
        (32, [16, 8, 4, 2, 1]),  # as with poolings that round down
        (8, [4, 2, 1, 1, 1]),
        (28, [14, 7, 4, 2, 1]),
        (1, [1, 1, 1, 1, 1]),
    ],
)
def test_cifar_poolings_never_go_below_one_pixel(size, grids):
    model = create_model("vgg11", num_classes=10, width=0.125, stem="cifar")
    seen = []
    for module in model.features:
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-1]))
    assert model(torch.randn(2, 3, size, size)).shape == (2, 10)
    assert seen == grids


def test_imagenet_poolings_round_down_as_published():
    model = create_model("vgg11", num_classes=5, width=0.01)
    seen = []
    model.features[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape[-2:]))
    model(torch.randn(2, 3, 63, 95))
    assert seen == [(1, 2)]


def test_width_scales_features_and_head():
    state = on_meta("vgg16", width=0.25).state_dict()
    assert state["features.40.weight"].shape == (128, 128, 3, 3)
    assert state["classifier.0.weight"].shape == (1024, 128 * 49)
    assert state["classifier.3.weight"].shape == (1024, 1024)
    assert on_meta("vgg16", width=0.25, stem="cifar").state_dict()["classifier.weight"].shape == (1000, 128)


def test_head_starts_small():
    torch.manual_seed(0)
    model = create_model("vgg11", num_classes=10, width=0.125)
    assert model.classifier[0].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not any(layer.bias.any() for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear))
