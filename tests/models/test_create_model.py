import math
import operator
import re

import pytest
import torch
from torch import nn

from clicktrain.errors import UserError
from clicktrain.models import create_model, list_models, min_image_size, scaled_channels

NAMES = list_models()
# One network of each kind of layer; the others differ from these in depth only.
KINDS = ["resnet18", "resnet50", "resnet50_v1", "resnet20", "vgg11", "mobilenet_v1", "mobilenet_v3_small"]


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def small(name, stem="cifar", **options):
    return create_model(name, **{"num_classes": 7, "width": 0.125, "stem": stem, **options})


def test_the_zoo_has_the_networks_of_the_papers():
    resnets = {f"resnet{d}" for d in (18, 34, 50, 101, 8, 14, 20, 32, 44, 56, 110)}
    others = {"resnet50_v1", "resnet101_v1", "resnet50_cifar", "resnet32_wide", "vgg11", "vgg13", "vgg16"}
    small = {"mobilenet_v1", "mobilenet_v3_small", "mobilenet_v3_large", "cifarnet"}
    assert {*resnets, *others, *small} == set(NAMES)
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_at_an_odd_size(name, stem):
    model = small(name, stem, in_channels=2)
    height, width = (35, 47) if stem == "imagenet" else (9, 13)
    logits = model(torch.randn(3, 2, height, width))
    assert logits.shape == (3, 7)
    assert logits.isfinite().all()
    nn.functional.cross_entropy(logits, torch.tensor([0, 3, 6])).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.weight.grad.any() for m in convolutions)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (5, 31), (32, 32)])
@pytest.mark.parametrize("name", KINDS)
def test_cifar_stems_take_any_size(name, size):
    assert min_image_size(name, "cifar") == 1
    assert small(name)(torch.randn(2, 3, *size)).shape == (2, 7)


@pytest.mark.parametrize("name", KINDS)
def test_min_image_size_is_the_smallest_that_works(name):
    size = min_image_size(name)
    model = small(name, stem=None, width=0.01)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)
    if size > 1:
        with pytest.raises(RuntimeError, match="too small"):
            model(torch.randn(2, 3, size - 1, size - 1))


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("name", NAMES)
def test_symbolic_trace_keeps_modules_and_only_adds_scales_and_flattens_between(name, stem):
    with torch.device("meta"):
        model = small(name, stem)
    graph = torch.fx.symbolic_trace(model).graph
    functions = {node.target for node in graph.nodes if node.op == "call_function"}
    assert functions <= {operator.add, operator.mul, torch.flatten}
    assert {node.op for node in graph.nodes} <= {"placeholder", "call_module", "call_function", "output"}
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    leaves = {n for n, m in model.named_modules() if not list(m.children())}
    assert sorted(called) == sorted(leaves)  # each layer runs exactly once: hooks see what the graph shows


@pytest.mark.parametrize("name", KINDS)
def test_trace_computes_the_same_at_another_size(name):
    model = small(name).eval()
    traced = torch.fx.symbolic_trace(model)
    for size in (16, 21):
        x = torch.randn(2, 3, size, size)
        assert traced(x).equal(model(x))


@pytest.mark.parametrize("name", KINDS)
def test_channels_last_computes_the_same(name):
    model, x = small(name).double().eval(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model(x)
    last = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][-1]
    formats = []
    last.register_forward_hook(
        lambda module, inputs, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    y = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert formats == [True]


@pytest.mark.parametrize("name", KINDS)
def test_bf16_by_autocast_and_throughout(name):
    model, x = small(name), torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    pure = model.bfloat16()(x.bfloat16())
    for logits in (mixed, pure):
        assert logits.dtype == torch.bfloat16
        assert logits.isfinite().all()


@pytest.mark.parametrize("name", KINDS)
def test_backward_hooks_can_sit_on_every_layer(name):
    model, seen = small(name), set()
    for layer, module in model.named_modules():
        module.register_full_backward_hook(lambda m, grads_in, grads_out, layer=layer: seen.add(layer))
    model(torch.randn(2, 3, 16, 16, requires_grad=True)).sum().backward()
    stages = {
        layer for layer in dict(model.named_modules()) if re.fullmatch(r"layer\d|features|blocks|", layer)
    }
    assert seen | stages == set(dict(model.named_modules()))


def test_same_seed_gives_the_same_weights():
    torch.manual_seed(5)
    first = small("mobilenet_v1").state_dict()
    torch.manual_seed(5)
    second = small("mobilenet_v1").state_dict()
    assert all(first[key].equal(second[key]) for key in first)


def test_stem_defaults_to_the_published_one():
    with torch.device("meta"):
        kernels = {n: create_model(n, num_classes=10).conv1.kernel_size for n in ("resnet18", "resnet20")}
    assert kernels == {"resnet18": (7, 7), "resnet20": (3, 3)}


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(16, 0.5, 8), (16, 0.1, 8), (20, 1.0, 20), (64, 0.3, 16), (100, 0.5, 48), (24, 1.5, 40), (64, 2.0, 128)],
)
def test_scaled_channels(channels, width, expected):
    assert scaled_channels(channels, width) == expected


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet19", "resnet18"),
        ("VGG16", "vgg16"),
        ("vgg16_bn", "vgg16"),
        ("mobilenet", "mobilenet_v1"),
        ("resnet152", "resnet"),
    ],
)
def test_unknown_name_gets_the_nearest_and_the_list(name, near):
    with pytest.raises(UserError) as caught:
        create_model(name, num_classes=10)
    text = str(caught.value)
    assert text.startswith(f"unknown model {name!r} (did you mean ")
    assert near in text.partition("?")[0]
    assert ", ".join(NAMES) in text
    assert "package.module:factory" in text
    assert "\n" not in text


def test_unknown_name_without_a_near_one():
    with pytest.raises(UserError, match=r"^unknown model 'xyz': the zoo has resnet18, "):
        create_model("xyz", num_classes=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"width": 0.0}, "width must be a positive number such as 0.5, got 0.0"),
        ({"width": math.nan}, "width must be a positive number such as 0.5, got nan"),
        ({"stem": "auto"}, "stem must be imagenet or cifar, got 'auto'"),
    ],
)
def test_values_out_of_range(options, message):
    with pytest.raises(UserError) as caught:
        create_model("resnet20", **{"num_classes": 10, **options})
    assert str(caught.value) == message
