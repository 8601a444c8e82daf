"""Learning rates by depth and by name: which parameters get which, and what acts by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from clicktrain import PruneTrain
from clicktrain.errors import UserError
from clicktrain.models import create_model
from clicktrain.train import RunConfig, config_to_dict, from_dict
from clicktrain.train.layer_rates import depths, rate_factors
from clicktrain.train.optim import make_optimizer, make_scheduler, shown_learning_rate


def zoo(name: str) -> nn.Module:
    return create_model(name, num_classes=4, in_channels=3, width=0.125, stem="cifar")


def test_depths_are_blocks_from_the_input_to_the_classifier() -> None:
    blocks = depths(zoo("resnet20"))
    first = ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert blocks[0] == first
    assert blocks[-1] == ["fc.weight", "fc.bias"]
    assert [names[0].rpartition(".conv1")[0] for names in blocks[1:-1]] == [
        f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)
    ]
    assert len(depths(zoo("resnet8"))) == 5  # of stages with one block each
    assert len(depths(zoo("vgg11"))) == 9  # eight convolutions with their norms, and the classifier
    for name in ("resnet20", "vgg11", "cifarnet", "mobilenet_v1"):
        model = zoo(name)
        assert sorted(name for names in depths(model) for name in names) == sorted(
            n for n, _ in model.named_parameters()
        )


class Wrapped(nn.Module):
    """A network inside of one that only scales images, with a token of its own in a container."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def test_odd_networks_have_depths_too() -> None:
    wrapped = depths(Wrapped(zoo("resnet8")))
    assert [names[0] for names in wrapped] == [f"inner.{names[0]}" for names in depths(zoo("resnet8"))]
    assert depths(nn.Linear(2, 2)) == [["weight", "bias"]]
    assert depths(nn.BatchNorm1d(2)) == [["weight", "bias"]]
    shared = nn.Linear(3, 3)
    tied = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared), nn.Linear(3, 2))
    assert depths(tied) == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]


def test_factors_fall_by_depth_and_multiply_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.Linear(2, 2))
    factors = rate_factors(model, 0.5, {"0.*": 10, "*.bias": 3})
    assert factors == pytest.approx(
        {"0.weight": 2.5, "0.bias": 7.5, "1.weight": 0.25, "1.bias": 0.75,
         "2.weight": 0.5, "2.bias": 1.5, "3.weight": 1, "3.bias": 3}
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"layer_rates has 'fc\.\*', which fits no parameter: .* 0\.\*, 1\.\*"
    ):
        rate_factors(model, 1.0, {"fc.*": 2})


def rates(model: nn.Module, **settings: Any) -> dict[str, tuple[float, float]]:
    made = make_optimizer(model, RunConfig(learning_rate=0.1, weight_decay=0.01, **settings))
    by_id = {id(p): (g["lr"], g["weight_decay"]) for g in made.param_groups for p in g["params"]}
    return {name: by_id[id(p)] for name, p in model.named_parameters()}


def test_groups_have_the_rates_and_the_schedule_scales_them_all() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    made = rates(model, layer_decay=0.5, decay_norm_and_bias=False, bias_rate_factor=2.0)
    assert made["0.weight"] == pytest.approx((0.05, 0.01))
    assert made["1.weight"] == pytest.approx((0.05, 0.0))
    assert made["2.weight"] == pytest.approx((0.1, 0.01))
    assert made["2.bias"] == pytest.approx((0.2, 0.0))
    config = RunConfig(learning_rate=0.1, layer_decay=0.5, layer_rates={"2.*": 3}, schedule="linear")
    optimizer = make_optimizer(model, config)
    scheduler = make_scheduler(optimizer, config, 10)
    for step in range(10):
        lr = 0.1 * (1 - step / 10)
        assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([lr / 2, 3 * lr])
        assert shown_learning_rate(optimizer) == pytest.approx(lr)
        optimizer.step()
        scheduler.step()


def test_one_rate_is_one_group_as_ever() -> None:
    model = zoo("resnet8")
    (group,) = make_optimizer(model, RunConfig()).param_groups
    assert group["params"] == list(model.parameters())
    assert "rate_factor" not in group


def test_settings_are_read_kept_and_checked() -> None:
    config, method = from_dict({"layer_rates": {"fc.*": 10, "conv1.*": 0.5}, "layer_decay": 0.9})
    assert config.layer_rates == {"fc.*": 10.0, "conv1.*": 0.5}
    assert from_dict(config_to_dict(config, method))[0] == config
    with pytest.raises(UserError, match=r"layer_rates has 0 for 'fc\.\*': must be above 0"):
        RunConfig(layer_rates={"fc.*": 0})
    with pytest.raises(UserError, match="layer_decay is 0: must be above 0"):
        RunConfig(layer_decay=0)
    with pytest.raises(UserError, match=r"layer_decay is 1\.2: must be at most 1"):
        RunConfig(layer_decay=1.2)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_the_lasso_shrinks_a_slower_layer_less(kind: str) -> None:
    """A proximal step is the learning rate of the weight times the lasso's strength."""

    def lost(rate: float) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)
        )
        x = torch.randn(4, 1, 7, 7)
        model(x)
        groups = [{"params": [p for n, p in model.named_parameters() if n[0] != "2"], "lr": 1e-3},
                  {"params": list(model[2].parameters()), "lr": 1e-3 * rate}]  # fmt: skip
        optimizer = torch.optim.SGD(groups) if kind == "sgd" else torch.optim.Adam(groups)
        method = PruneTrain(coefficient=0.5, interval=1000)
        pruner = method.attach(model, optimizer, epochs=2, steps_per_epoch=4, example=x[:1])
        before = [model[at].weight.detach().clone() for at in (0, 2)]
        loss = model(x).square().mean()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad *= 1e-6  # so that what moves the weights is the lasso
        pruner.observe(loss)
        optimizer.step()
        pruner.close()
        after = [model[at].weight.detach() for at in (0, 2)]
        return [float((new - old).norm()) for new, old in zip(after, before, strict=True)]

    same, slower = lost(1.0), lost(0.1)
    assert slower[1] == pytest.approx(same[1] / 10, rel=0.1)
    if kind == "sgd":
        assert slower[0] == pytest.approx(same[0], rel=1e-4)
