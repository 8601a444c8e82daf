import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clicktrain.models import create_model
from clicktrain.models.mobilenet_v3 import squeeze_channels

# Howard et al. 2019, tables 2 and 1: kernel, expanded channels, channels of squeeze-and-excitation as
# torchvision has them (0: none), filters, activation, stride; then the last convolution and the hidden layer.
RE, HS = nn.ReLU, nn.Hardswish
SMALL = [
    (3, 16, 8, 16, RE, 2), (3, 72, 0, 24, RE, 2), (3, 88, 0, 24, RE, 1), (5, 96, 24, 40, HS, 2),
    (5, 240, 64, 40, HS, 1), (5, 240, 64, 40, HS, 1), (5, 120, 32, 48, HS, 1), (5, 144, 40, 48, HS, 1),
    (5, 288, 72, 96, HS, 2), (5, 576, 144, 96, HS, 1), (5, 576, 144, 96, HS, 1),
]  # fmt: skip
LARGE = [
    (3, 16, 0, 16, RE, 1), (3, 64, 0, 24, RE, 2), (3, 72, 0, 24, RE, 1), (5, 72, 24, 40, RE, 2),
    (5, 120, 32, 40, RE, 1), (5, 120, 32, 40, RE, 1), (3, 240, 0, 80, HS, 2), (3, 200, 0, 80, HS, 1),
    (3, 184, 0, 80, HS, 1), (3, 184, 0, 80, HS, 1), (3, 480, 120, 112, HS, 1), (3, 672, 168, 112, HS, 1),
    (5, 672, 168, 160, HS, 2), (5, 960, 240, 160, HS, 1), (5, 960, 240, 160, HS, 1),
]  # fmt: skip
TABLES = {"mobilenet_v3_small": (SMALL, 576, 1024), "mobilenet_v3_large": (LARGE, 960, 1280)}
NAMES = list(TABLES)


def on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **{"num_classes": 1000, **options})


def conv_norm(name, filters, channels, kernel):
    vectors = ["weight", "bias", "running_mean", "running_var"]
    return [
        (f"{name}.0.weight", (filters, channels, kernel, kernel)),
        *((f"{name}.1.{v}", (filters,)) for v in vectors),
        (f"{name}.1.num_batches_tracked", ()),
    ]


def expected_entries(name, num_classes=1000):
    """torchvision's state-dict entries, in order, by the tables above."""
    rows, last, hidden = TABLES[name]
    entries, channels = conv_norm("features.0", 16, 3, 3), 16
    for i, (kernel, expanded, squeezed, filters, _, _) in enumerate(rows, start=1):
        parts = []
        if expanded != channels:
            parts.append(lambda n, e=expanded, c=channels: conv_norm(n, e, c, 1))
        parts.append(lambda n, e=expanded, k=kernel: conv_norm(n, e, 1, k))
        if squeezed:
            parts.append(
                lambda n, e=expanded, s=squeezed: [
                    (f"{n}.fc1.weight", (s, e, 1, 1)), (f"{n}.fc1.bias", (s,)),
                    (f"{n}.fc2.weight", (e, s, 1, 1)), (f"{n}.fc2.bias", (e,)),
                ]
            )  # fmt: skip
        parts.append(lambda n, f=filters, e=expanded: conv_norm(n, f, e, 1))
        for j, part in enumerate(parts):
            entries += part(f"features.{i}.block.{j}")
        channels = filters
    entries += conv_norm(f"features.{len(rows) + 1}", last, channels, 1)
    entries += [("classifier.0.weight", (hidden, last)), ("classifier.0.bias", (hidden,))]
    return [*entries, ("classifier.3.weight", (num_classes, hidden)), ("classifier.3.bias", (num_classes,))]


@pytest.mark.parametrize("name", NAMES)
def test_entries_are_those_of_torchvision(name):
    found = [(key, tuple(value.shape)) for key, value in on_meta(name).state_dict().items()]
    assert found == expected_entries(name)


@pytest.mark.parametrize("name", NAMES)
def test_activations_strides_and_residuals_of_the_tables(name):
    model, channels = on_meta(name), 16
    for block, (_, _, squeezed, filters, activation, stride) in zip(
        list(model.features)[1:-1], TABLES[name][0], strict=True
    ):
        kinds = [type(m) for m in block.modules() if isinstance(m, RE | HS)]
        outside = kinds.count(activation) - (activation is RE and bool(squeezed))
        assert outside == len(kinds) - bool(squeezed)  # squeeze-and-excitation has a ReLU of its own
        (depthwise,) = (m for m in block.modules() if isinstance(m, nn.Conv2d) and m.groups > 1)
        assert depthwise.stride == (stride, stride)
        assert block.residual == (stride == 1 and channels == filters)
        channels = filters


@pytest.mark.parametrize(
    # Howard et al. 2019, table 3: 56 and 219 million multiply-adds; parameters as torchvision counts them.
    ("name", "mega_macs", "parameters"),
    [("mobilenet_v3_small", 56, 2_542_856), ("mobilenet_v3_large", 219, 5_483_032)],
)
def test_cost(name, mega_macs, parameters):
    model = on_meta(name)
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e6 == pytest.approx(mega_macs, rel=0.015)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_squeeze_is_a_quarter_but_not_much_less():
    assert [squeeze_channels(c) for c in (8, 72, 120, 144)] == [8, 24, 32, 40]


def test_squeeze_and_excitation_by_hand():
    torch.manual_seed(0)
    block = create_model("mobilenet_v3_small", num_classes=3).features[1].block[1]
    x = torch.randn(2, 16, 5, 6)
    means = x.mean((2, 3))
    hidden = (means @ block.fc1.weight.flatten(1).T + block.fc1.bias).clamp_min(0)
    scale = ((hidden @ block.fc2.weight.flatten(1).T + block.fc2.bias) / 6 + 0.5).clamp(0, 1)
    torch.testing.assert_close(block(x), x * scale[:, :, None, None])


@pytest.mark.parametrize("name", NAMES)
def test_cifar_stem_keeps_the_resolution(name):
    model = create_model(name, num_classes=10, width=0.25, stem="cifar")
    grids = []
    model.features[0].register_forward_hook(lambda module, inputs, output: grids.append(output.shape[-2:]))
    model(torch.randn(2, 3, 32, 32))
    assert grids == [(32, 32)]
