"""Networks whose weights are spread over processes are refused, wherever the sharding comes in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from clicktrain import ClickTrain, UserError
from clicktrain.methods.base import Method
from clicktrain.methods.driver.pruner import Pruner

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
REFUSED = r"is sharded \({}\): each process has pieces .* use DistributedDataParallel, by pruner\.wrapped"


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one process."""
    store: Path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def attach(model: nn.Module) -> Pruner:
    method: Method = ClickTrain(compression=2)
    return method.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), epochs=4, steps_per_epoch=4)


def fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def sharded_in_place(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    return model


def with_sharded_weights(model: nn.Module) -> nn.Module:
    from torch.distributed.tensor import distribute_module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        distribute_module(model, dist.init_device_mesh("cpu", (1,)))
    return model


WAYS = {
    "FullyShardedDataParallel": fully_sharded,
    "FSDPModule": sharded_in_place,
    "DTensor": with_sharded_weights,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_sharded_network_is_refused(way: str) -> None:
    with pytest.raises(UserError, match=f"the network {REFUSED}|0 {REFUSED}".format(way, way)):
        attach(WAYS[way](network()))


@pytest.mark.parametrize("way", ["FullyShardedDataParallel", "FSDPModule"])
def test_wrapping_it_by_the_pruner_is_refused(way: str) -> None:
    pruner = attach(network())
    with pytest.raises(UserError, match=REFUSED.format(way)):
        pruner.wrapped(WAYS[way])(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("way", WAYS)
def test_sharding_it_after_attach_is_noticed_at_the_next_batch(way: str) -> None:
    model = network()
    pruner = attach(model)
    WAYS[way](model)
    with pytest.raises(UserError, match=REFUSED.format(f"({way}|DTensor)")):
        pruner.observe(torch.tensor(1.0))
