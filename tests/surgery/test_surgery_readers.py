"""Channels that no layer reads go whatever arrives in them; silent ones may be cut at any time."""

from __future__ import annotations

import copy

import pytest
import torch
from odd_graphs import ALL, assert_same_function, images, kept, network
from torch import Tensor, nn

from clicktrain.errors import UserError
from clicktrain.surgery import (
    ChannelGroup,
    apply_surgery_,
    channel_groups,
    plan_from_keep,
    plan_from_zeros,
    silence_,
)


@torch.no_grad()
def unread_(model: nn.Module, groups: tuple[ChannelGroup, ...]) -> dict[str, Tensor]:
    """Zero what reads random channels, and leave the filters that make them: group -> bool, True = read."""
    read = {}
    for group in groups:
        mask = torch.rand(group.size) >= 0.5
        if group.fixed is not None or not mask.any():
            mask[:] = True
        read[group.name] = mask
        for member in group.members:
            layer = model.get_submodule(member.name.rpartition(".")[0])
            inputs = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
            tensor = dict(model.named_parameters()).get(member.name)
            if tensor is None or tensor.dim() < 2 or member.dim != inputs:
                continue
            dead = [i for c, lives in enumerate(mask.tolist()) if not lives for i in member.indices[c]]
            tensor.index_fill_(member.dim, torch.tensor(dead, dtype=torch.int64), 0.0)
    return read


@pytest.mark.parametrize("name", ALL)
def test_what_nobody_reads_goes(name: str) -> None:
    model = network(name)
    groups = channel_groups(model, images(2))
    read = unread_(model, groups)
    before = copy.deepcopy(model)
    both = kept(plan_from_zeros(model, images(2)), groups)
    plan = plan_from_zeros(model, images(2), sides="readers")
    left = kept(plan, groups)
    has_readers = any(
        member.dim == 1 and not member.name.endswith("up.weight")
        for group in groups
        for member in group.members
    )
    assert has_readers
    assert sum(left.values()) < sum(both.values())
    assert all(left[group.name] <= both[group.name] for group in groups)
    assert any(left[group.name] == int(read[group.name].sum()) < group.size for group in groups)
    apply_surgery_(plan, model)
    assert_same_function(model, before)


@pytest.mark.parametrize("name", ALL)
def test_silent_channels_are_cut_without_a_change(name: str) -> None:
    model = network(name)
    keep = {
        group.name: torch.arange(group.size) % 3 > 0
        for group in channel_groups(model, images(2))
        if group.fixed is None and group.size > 1
    }
    plan = plan_from_keep(model, images(2), keep)
    shapes = [tensor.shape for tensor in model.state_dict().values()]
    whole = copy.deepcopy(model)
    silence_(plan, model)
    assert [tensor.shape for tensor in model.state_dict().values()] == shapes
    small = copy.deepcopy(model)
    apply_surgery_(plan, small)
    x = images()
    model.eval(), small.eval(), whole.eval()
    assert not torch.allclose(whole(x), small(x))
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)


def test_mistakes() -> None:
    model = network("Depthwise")
    with pytest.raises(UserError, match="sides must be 'both' or 'readers'"):
        plan_from_zeros(model, images(2), sides="writers")  # type: ignore[arg-type]
    other = plan_from_keep(network("Plain"), images(2), {"conv1": torch.arange(6) > 0})
    with pytest.raises(UserError, match="made for another network"):
        silence_(other, model)
