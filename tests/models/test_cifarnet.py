import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clicktrain.errors import UserError
from clicktrain.models import create_model
from clicktrain.models.whitening import whiten_


def build(**options):
    return create_model("cifarnet", **{"num_classes": 10, **options})


def test_shapes_of_the_paper():
    model = build()
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert shapes == [
        (24, 3, 2, 2),
        (64, 24, 3, 3), (64, 64, 3, 3),
        (256, 64, 3, 3), (256, 256, 3, 3),
        (256, 256, 3, 3), (256, 256, 3, 3),
        (10, 256),
    ]  # fmt: skip
    assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == 1_970_464
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    # 10 epochs of 50,000 images, the backward pass twice the forward pass: 3.5e14 (the paper's 3.6e14
    # include the validation images).
    assert counter.get_total_flops() * 3 * 500_000 == pytest.approx(3.5e14, rel=0.05)


def test_norms_have_no_trained_scale():
    for norm in (m for m in build(width=0.25).modules() if isinstance(m, nn.BatchNorm2d)):
        assert not norm.weight.requires_grad
        assert norm.bias.requires_grad


def test_convolutions_begin_as_the_identity():
    convs = [m for m in build(width=0.125).modules() if isinstance(m, nn.Conv2d)][1:]
    for conv in convs:
        x = torch.randn(1, conv.in_channels, 5, 5)
        same = min(conv.in_channels, conv.out_channels)
        assert torch.equal(conv(x)[:, :same], x[:, :same])


def literal_precision(images, side):
    """The inverse of the patches' covariance with the noise, from patches taken one by one."""
    n, _, h, w = images.shape
    patches = [
        images[i, :, y : y + side, x : x + side].reshape(-1)
        for i in range(n) for y in range(h - side + 1) for x in range(w - side + 1)
    ]  # fmt: skip
    covariance = torch.cov(torch.stack(patches).double().T, correction=0)
    return torch.linalg.inv(covariance + 5e-4 * torch.eye(len(covariance)))


def test_whitening_is_that_of_the_patches():
    torch.manual_seed(0)
    images = F.interpolate(torch.randn(40, 3, 4, 4), size=9, mode="bilinear")
    layer = nn.Conv2d(3, 24, 2)
    whiten_(layer, images)
    filters = layer.weight[:12].flatten(1).double()
    torch.testing.assert_close(filters.T @ filters, literal_precision(images, 2), rtol=1e-4, atol=1e-3)
    assert (filters.norm(dim=1).diff() > 0).all()  # the largest variance first
    assert torch.equal(layer.weight[12:], -layer.weight[:12])
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad


def test_whitened_results_are_uncorrelated():
    torch.manual_seed(1)
    images = F.interpolate(torch.randn(200, 3, 6, 6), size=12, mode="bilinear")
    layer = nn.Conv2d(3, 24, 2, bias=False)
    whiten_(layer, images)
    covariance = torch.cov(layer(images)[:, :12].transpose(0, 1).reshape(12, -1))
    large = covariance.diag() > 0.9  # components far above the noise that is added to each variance
    assert int(large.sum()) >= 8
    off = covariance - torch.diag(covariance.diag())
    assert off.abs().max() < 1e-3


def test_fewer_filters_keep_the_largest_components():
    torch.manual_seed(2)
    images = torch.randn(30, 3, 8, 8)
    many, few = nn.Conv2d(3, 24, 2), nn.Conv2d(3, 9, 2)
    before = few.weight[8].clone()
    whiten_(many, images)
    whiten_(few, images)
    assert torch.equal(few.weight[:4], many.weight[:4])
    assert torch.equal(few.weight[4:8], -many.weight[:4])
    assert torch.equal(few.weight[8], before)


@pytest.mark.parametrize(
    ("layer", "images"),
    [
        (nn.Conv2d(3, 24, 2), torch.zeros(2, 1, 8, 8)),
        (nn.Conv2d(3, 24, 3), torch.zeros(2, 3, 2, 8)),
        (nn.Conv2d(4, 24, 2, groups=2), torch.zeros(2, 4, 8, 8)),
    ],
)
def test_other_images_are_refused(layer, images):
    with pytest.raises(UserError, match="whitening"):
        whiten_(layer, images)
