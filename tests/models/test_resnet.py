import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clicktrain.models import create_model
from clicktrain.models.resnet import Bottleneck, cifar_spec, resnet

# He et al. 2016, table 1 and section 4.2: filters of the stem, then for each stage the convolutions of a
# block as (kernel, filters), and the number of blocks.
TABLE = {
    "resnet18": (64, [([(3, 64)] * 2, 2), ([(3, 128)] * 2, 2), ([(3, 256)] * 2, 2), ([(3, 512)] * 2, 2)]),
    "resnet34": (64, [([(3, 64)] * 2, 3), ([(3, 128)] * 2, 4), ([(3, 256)] * 2, 6), ([(3, 512)] * 2, 3)]),
    "resnet50": (
        64,
        [
            ([(1, 64), (3, 64), (1, 256)], 3),
            ([(1, 128), (3, 128), (1, 512)], 4),
            ([(1, 256), (3, 256), (1, 1024)], 6),
            ([(1, 512), (3, 512), (1, 2048)], 3),
        ],
    ),
    "resnet101": (
        64,
        [
            ([(1, 64), (3, 64), (1, 256)], 3),
            ([(1, 128), (3, 128), (1, 512)], 4),
            ([(1, 256), (3, 256), (1, 1024)], 23),
            ([(1, 512), (3, 512), (1, 2048)], 3),
        ],
    ),
    "resnet20": (16, [([(3, 16)] * 2, 3), ([(3, 32)] * 2, 3), ([(3, 64)] * 2, 3)]),
    "resnet32": (16, [([(3, 16)] * 2, 5), ([(3, 32)] * 2, 5), ([(3, 64)] * 2, 5)]),
    "resnet56": (16, [([(3, 16)] * 2, 9), ([(3, 32)] * 2, 9), ([(3, 64)] * 2, 9)]),
    # Lym et al. 2019, figure 8, and their code.
    "resnet50_cifar": (
        16,
        [
            ([(1, 16), (3, 16), (1, 64)], 8),
            ([(1, 32), (3, 32), (1, 128)], 8),
            ([(1, 64), (3, 64), (1, 256)], 8),
        ],
    ),
    # The code published with Zhang et al. 2021.
    "resnet32_wide": (
        64,
        [([(3, 64)] * 2, 3), ([(3, 128)] * 2, 4), ([(3, 256)] * 2, 5), ([(3, 512)] * 2, 3)],
    ),
}
TABLE["resnet50_v1"] = TABLE["resnet50"]
TABLE["resnet101_v1"] = TABLE["resnet101"]


def norm_entries(name, channels):
    vectors = ["weight", "bias", "running_mean", "running_var"]
    return [(f"{name}.{v}", (channels,)) for v in vectors] + [(f"{name}.num_batches_tracked", ())]


def expected_entries(name, stem_kernel, num_classes=1000, in_channels=3):
    """torchvision's state-dict entries, in order, by the table above."""
    channels, stages = TABLE[name]
    entries = [
        ("conv1.weight", (channels, in_channels, stem_kernel, stem_kernel)),
        *norm_entries("bn1", channels),
    ]
    for stage, (convolutions, blocks) in enumerate(stages, start=1):
        for block in range(blocks):
            prefix, source = f"layer{stage}.{block}", channels
            for i, (kernel, filters) in enumerate(convolutions, start=1):
                entries.append((f"{prefix}.conv{i}.weight", (filters, channels, kernel, kernel)))
                entries += norm_entries(f"{prefix}.bn{i}", filters)
                channels = filters
            if block == 0 and (stage > 1 or source != channels):
                entries.append((f"{prefix}.downsample.0.weight", (channels, source, 1, 1)))
                entries += norm_entries(f"{prefix}.downsample.1", channels)
    return [*entries, ("fc.weight", (num_classes, channels)), ("fc.bias", (num_classes,))]


def entries(model):
    return [(key, tuple(value.shape)) for key, value in model.state_dict().items()]


def on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **{"num_classes": 1000, **options})


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def macs(model, size):
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, size, size, device="meta"))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("name", "count", "num_entries"),
    [
        ("resnet18", 11_689_512, 122),
        ("resnet34", 21_797_672, 218),
        ("resnet50", 25_557_032, 320),
        ("resnet101", 44_549_160, 626),
        ("resnet50_v1", 25_557_032, 320),
        ("resnet101_v1", 44_549_160, 626),
    ],
)
def test_imagenet_entries_are_those_of_torchvision(name, count, num_entries):
    model = on_meta(name)
    assert entries(model) == expected_entries(name, stem_kernel=7)
    assert parameters(model) == count
    assert len(model.state_dict()) == num_entries


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_cifar_stem_changes_only_the_shape_of_conv1(name):
    model = on_meta(name, stem="cifar", num_classes=10, in_channels=1)
    assert entries(model) == expected_entries(name, stem_kernel=3, num_classes=10, in_channels=1)


@pytest.mark.parametrize(
    ("name", "count", "mega_macs"),
    # Published counts are for option A; the two projections add 2,752 parameters and 262,144 MACs.
    [
        ("resnet20", 269_722 + 2_752, 40.55 + 0.26),
        ("resnet32", 464_154 + 2_752, 68.86 + 0.26),
        ("resnet56", 853_018 + 2_752, 125.49 + 0.26),
    ],
)
def test_cifar_networks(name, count, mega_macs):
    model = on_meta(name, num_classes=10)
    assert entries(model) == expected_entries(name, stem_kernel=3, num_classes=10)
    assert parameters(model) == count
    assert macs(model, 32) / 1e6 == pytest.approx(mega_macs, abs=0.02)


@pytest.mark.parametrize(
    ("name", "count", "mega_flops"),
    # PruneTrain's figure 8 has 230 MFLOPs for its ResNet-50; the ImageNet network has eleven times as many.
    [
        ("resnet50_cifar", 776_794, 227.9),
        ("resnet50", 23_520_842, 2_595.7),
        ("resnet32", 466_906, 138.2),
        ("resnet34", 21_282_122, 2_318.9),
        ("resnet32_wide", 20_101_450, 2_167.8),
    ],
)
def test_networks_of_the_same_name_for_cifar(name, count, mega_flops):
    model = on_meta(name, num_classes=10, stem="cifar")
    assert entries(model) == expected_entries(name, stem_kernel=3, num_classes=10)
    assert parameters(model) == count
    assert 2 * macs(model, 32) / 1e6 == pytest.approx(mega_flops, abs=0.1)


def test_prunetrains_resnet50_strides_in_the_3x3():
    blocks = [m for m in on_meta("resnet50_cifar", num_classes=10).modules() if isinstance(m, Bottleneck)]
    strides = [(b.conv1.stride[0], b.conv2.stride[0]) for b in blocks]
    assert strides == [(1, 2 if i in (8, 16) else 1) for i in range(24)]


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 56, 110])
def test_depth_of_a_cifar_network_counts_its_weighted_layers(depth):
    model = on_meta(f"resnet{depth}", num_classes=10)
    main_path = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in name
    ]
    assert len(main_path) == depth


@pytest.mark.parametrize("depth", [2, 18, 21, 101])
def test_other_depths_are_no_cifar_network(depth):
    with pytest.raises(ValueError, match=f"6n \\+ 2 layers, got {depth}"):
        cifar_spec(depth)


@pytest.mark.parametrize(
    ("name", "giga_macs"),
    [
        ("resnet18", 1.814),
        ("resnet34", 3.664),
        ("resnet50", 4.089),
        ("resnet101", 7.801),
        ("resnet50_v1", 3.858),
        ("resnet101_v1", 7.570),
    ],
)
def test_strides_give_the_published_multiply_adds(name, giga_macs):
    assert macs(on_meta(name), 224) / 1e9 == pytest.approx(giga_macs, abs=0.0006)


@pytest.mark.parametrize(("name", "stride_1x1", "stride_3x3"), [("resnet50", 1, 2), ("resnet50_v1", 2, 1)])
def test_where_a_bottleneck_strides(name, stride_1x1, stride_3x3):
    block = on_meta(name).get_submodule("layer2.0")
    assert isinstance(block, Bottleneck)
    assert block.conv1.stride == (stride_1x1, stride_1x1)
    assert block.conv2.stride == (stride_3x3, stride_3x3)


@pytest.mark.parametrize(("stem", "last_grid"), [("imagenet", 1), ("cifar", 4)])
def test_stem_sets_the_resolution(stem, last_grid):
    model = create_model("resnet18", num_classes=10, width=0.125, stem=stem)
    grids = []
    model.layer4.register_forward_hook(lambda module, inputs, output: grids.append(output.shape[-2:]))
    model(torch.randn(2, 3, 32, 32))
    assert grids == [(last_grid, last_grid)]


@pytest.mark.parametrize(("name", "norm"), [("resnet18", "bn2"), ("resnet50", "bn3"), ("resnet20", "bn2")])
def test_zero_init_makes_blocks_start_as_their_shortcut(name, norm):
    model = resnet(name, num_classes=10, width=0.125, stem="cifar", zero_init_residual=True)
    zero = {n for n, p in model.named_parameters() if n.endswith("weight") and not p.any()}
    last_norms = {f"{n}.{norm}.weight" for n, m in model.named_modules() if hasattr(m, norm) and n}
    assert zero == last_norms
    x = torch.rand(2, model.conv1.out_channels, 8, 8)
    first, second = model.layer1[0], model.layer1[1]
    assert second(first(x)).equal(first(x))
    plain = resnet(name, num_classes=10, width=0.125, stem="cifar")
    assert all(p.all() for n, p in plain.named_parameters() if n.endswith(f"{norm}.weight"))


def test_width_scales_every_channel():
    state = on_meta("resnet50", width=0.5).state_dict()
    assert state["conv1.weight"].shape == (32, 3, 7, 7)
    assert state["layer1.0.conv3.weight"].shape == (128, 32, 1, 1)
    assert state["layer4.2.conv2.weight"].shape == (256, 256, 3, 3)
    assert state["fc.weight"].shape == (1000, 1024)
    assert on_meta("resnet20", width=0.5).state_dict()["layer3.2.conv2.weight"].shape == (32, 32, 3, 3)


def test_start_values_follow_fan_out():
    torch.manual_seed(0)
    model = create_model("resnet18", num_classes=10, width=0.5)
    weight = model.get_submodule("layer3.0.conv1").weight  # 128 filters on 64 channels
    assert weight.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=1e-3)
