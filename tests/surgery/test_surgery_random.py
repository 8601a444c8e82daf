"""Random masks on random small graphs: what is removed is what was zero, and the function stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_graphs import CLASSES, assert_same_function, images, kept, kill_, shake_
from torch import Tensor, nn

from clicktrain.surgery import apply_surgery_, channel_groups, plan_from_keep, plan_from_zeros

pytestmark = pytest.mark.long

STEPS = ("conv", "depthwise", "grouped", "add", "cat", "gate", "pool", "norm", "act")


class RandomGraph(nn.Module):
    """A list of values that grows step by step; a step reads one or two of the values before."""

    def __init__(self, steps: list[tuple[str, int, int, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleDict()
        widths = [3]
        for i, (kind, a, b, width) in enumerate(steps):
            left, right = widths[a % len(widths)], widths[b % len(widths)]
            layer: nn.Module | None = None
            out = left
            if kind == "conv":
                out, layer = width, nn.Conv2d(left, width, 3, padding=1, bias=bool(b % 2))
            elif kind == "depthwise":
                out, layer = left * 2, nn.Conv2d(left, left * 2, 3, padding=1, groups=left)
            elif kind == "grouped":
                layer = nn.Conv2d(left, left, 1, groups=2 if left % 2 == 0 else 1)
            elif kind == "norm":
                layer = nn.BatchNorm2d(left)
            elif kind in ("add", "gate"):
                layer = nn.Conv2d(right, left, 1)
            elif kind == "cat":
                out = left + right
            if layer is not None:
                self.layers[str(i)] = layer
            widths.append(out)
        self.fc = nn.Linear(widths[-1] * 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for i, (kind, a, b, _) in enumerate(self.steps):
            left, right = values[a % len(values)], values[b % len(values)]
            if kind in ("conv", "depthwise", "grouped", "norm"):
                y = self.layers[str(i)](left)
            elif kind == "add":
                y = left + self.layers[str(i)](right)
            elif kind == "gate":
                y = left * torch.sigmoid(self.layers[str(i)](F.adaptive_avg_pool2d(right, 1)))
            elif kind == "cat":
                y = torch.cat([left, right], 1)
            else:
                y = F.max_pool2d(left, 3, 1, 1) if kind == "pool" else F.silu(left)
            values.append(y)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(values[-1], 2), 1))


@st.composite
def graphs(draw: Any) -> RandomGraph:
    count = draw(st.integers(2, 9))
    steps = [
        (draw(st.sampled_from(STEPS)), i - draw(st.integers(0, 1)) if i else 0, draw(st.integers(0, 9)), w)
        for i, w in enumerate(draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)))
    ]
    torch.manual_seed(draw(st.integers(0, 2**31)))
    model = RandomGraph(steps).double()
    shake_(model)
    return model


@settings(max_examples=40)
@given(graphs(), st.sampled_from([0.3, 0.7, 1.0]), st.sampled_from(["union", "gating"]), st.integers(1, 4))
def test_zero_channels(model: RandomGraph, fraction: float, scheme: Any, round_to: int) -> None:
    kill_(model, channel_groups(model, images(2, 6)), fraction)
    before = copy.deepcopy(model)
    apply_surgery_(plan_from_zeros(model, images(2, 6), scheme=scheme, round_to=round_to), model)
    assert_same_function(model, before, tolerance=1e-7)
    sum(output.sum() for output in model(images(2, 6))).backward()


@settings(max_examples=40)
@given(graphs(), st.floats(0.1, 0.9))
def test_any_channels(model: RandomGraph, fraction: float) -> None:
    """Whatever is cut, the network stays legal, as large as asked, and replays on a fresh one."""
    groups = channel_groups(model, images(2, 6))
    keep = {}
    for group in groups:
        if group.fixed is None:
            keep[group.name] = torch.rand(group.size) > fraction
            keep[group.name][0] = True
    plan = plan_from_keep(model, images(2, 6), keep)
    left = kept(plan, groups)
    assert all(left[name] == int(mask.sum()) for name, mask in keep.items())
    fresh = copy.deepcopy(model)
    for net in (model, fresh):
        apply_surgery_(plan, net)
    assert_same_function(model, fresh)
    assert not plan_from_keep(model, images(2, 6), {})
