import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from clicktrain.models import create_model

# Howard et al. 2017, table 1: filters of the 1x1 convolutions, and the grid each leaves of 224 x 224 pixels.
POINTWISE = [64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
GRIDS = [112, 56, 56, 28, 28, 14, 14, 14, 14, 14, 14, 7, 7]


def on_meta(**options):
    with torch.device("meta"):
        return create_model("mobilenet_v1", **{"num_classes": 1000, **options})


def test_shapes_and_grids_of_table_1():
    model = on_meta().eval()
    grids = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: grids.append(output.shape[-1]))
    model(torch.empty(1, 3, 224, 224, device="meta"))
    assert grids == GRIDS
    weights = {k: tuple(v.shape) for k, v in model.state_dict().items() if v.ndim == 4}
    expected, channels = {"conv1.weight": (32, 3, 3, 3)}, 32
    for i, filters in enumerate(POINTWISE):
        expected[f"blocks.{i}.depthwise.weight"] = (channels, 1, 3, 3)
        expected[f"blocks.{i}.pointwise.weight"] = (filters, channels, 1, 1)
        channels = filters
    assert weights == expected
    assert model.fc.weight.shape == (1000, 1024)


@pytest.mark.parametrize(
    # Howard et al. 2017, table 6: million multiply-adds and million parameters.
    ("width", "mega_macs", "mega_parameters"),
    [(1.0, 569, 4.2), (0.75, 325, 2.6), (0.5, 149, 1.3), (0.25, 41, 0.5)],
)
def test_cost_at_the_widths_of_the_paper(width, mega_macs, mega_parameters):
    model = on_meta(width=width)
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() / 2e6 == pytest.approx(mega_macs, abs=0.7)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(mega_parameters, abs=0.05)


def test_total_parameters():
    assert sum(p.numel() for p in on_meta().parameters()) == 4_231_976


def test_cifar_stem_keeps_the_resolution():
    model = create_model("mobilenet_v1", num_classes=10, width=0.25, stem="cifar")
    grids = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: grids.append(output.shape[-2:]))
    model(torch.randn(2, 3, 32, 32))
    assert grids == [(32, 32)]


def test_start_values_of_depthwise_kernels_count_one_filter_a_channel():
    torch.manual_seed(0)
    weight = create_model("mobilenet_v1", num_classes=10).get_submodule("blocks.12.depthwise").weight
    assert weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
