"""Torch-Pruning, where both support a network, ties the same channels together and removes the same."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from odd_graphs import assert_same_function, images, masked
from torch import nn

from clicktrain.surgery import apply_surgery_, channel_groups, plan_from_zeros

tp = pytest.importorskip("torch_pruning")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnet50", "resnet50_v1", "vgg11", "mobilenet_v1"])
def test_the_same_channels_go(name: str) -> None:
    model, alive = masked(name)
    theirs = copy.deepcopy(model)
    groups = channel_groups(model, images(2))
    # Its groups start at the outputs of a layer: one such start for each group of ours.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for group in groups:
            if group.fixed is not None or bool(alive[group.name].all()):
                continue
            layer = theirs.get_submodule(group.members[0].name.rpartition(".")[0])
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            graph = tp.DependencyGraph().build_dependency(theirs, example_inputs=images(2))
            dead = [i for i, lives in enumerate(alive[group.name].tolist()) if not lives]
            function = (
                tp.prune_conv_out_channels if isinstance(layer, nn.Conv2d) else tp.prune_linear_out_channels
            )
            graph.get_pruning_group(layer, function, idxs=dead).prune()
    # What we remove beyond the both-sides rule is zero by its batch norm: compare under the rule alone.
    before = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.bias.abs_().add_(0.1)
    plan = plan_from_zeros(model, images(2))
    apply_surgery_(plan, before)
    shapes = {key: value.shape for key, value in before.state_dict().items()}
    assert {key: value.shape for key, value in theirs.state_dict().items()} == shapes
    for key, value in theirs.state_dict().items():
        assert torch.equal(before.state_dict()[key], value), key
    assert_same_function(before, theirs)
