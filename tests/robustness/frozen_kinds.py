"""Networks whose ``forward`` decides something at each call, one kind each.

A kind is one function: ``layer(self, x)`` is the middle of a network whose layers are ``a``, ``c`` and ``d``.
"""

from __future__ import annotations

import random
from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SCALE = 1.0
"""A global flag that a forward reads; tests change it."""
Pair = namedtuple("Pair", ["logits", "features"])


class Middle(nn.Module):
    """Calls a kind's function."""

    level = 1.0

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("center", torch.zeros(8))
        self.count: Tensor
        self.n, self.alpha, self.seen, self.config = 0, 1.0, [], SimpleNamespace(alpha=1.0)
        self.generator = torch.Generator()
        self.plain = torch.zeros(())
        self._kind = kind

    def forward(self, x: Tensor) -> Any:
        return self._kind(self, x)


class Net(nn.Module):
    """A convolution before and after the middle."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.a, self.middle = nn.Conv2d(3, 8, 3, padding=1), Middle(kind)
        self.e, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(F.relu(self.a(x)))
        y: Tensor = self.fc(F.relu(self.e(x)).mean((2, 3)))
        return y


class Outermost(Net):
    """The kind's function is called by the outermost forward."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle._kind(self.middle, F.relu(self.a(x)))
        y: Tensor = self.fc(F.relu(self.e(x)).mean((2, 3)))
        return y


def layer_drop(m: Any, x: Tensor) -> Any:
    return x if m.training and torch.rand(1).item() < 0.5 else x + m.c(x)


def random_scale_of_the_batch(m: Any, x: Tensor) -> Any:
    return x + m.c(x) * (torch.rand(1, 1, 1, 1) < 0.5).float() if m.training else x + 0.5 * m.c(x)


def random_scale_of_images(m: Any, x: Tensor) -> Any:
    keep = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(0.5) if m.training else 0.5
    return x + m.c(x) * keep


def noise(m: Any, x: Tensor) -> Any:
    y = m.c(x)
    return y + (torch.randn_like(y) if m.training else 0)


def python_random(m: Any, x: Tensor) -> Any:
    return m.c(x) * random.random()


def numpy_random(m: Any, x: Tensor) -> Any:
    return m.c(x) * float(numpy.random.rand())


def own_generator(m: Any, x: Tensor) -> Any:
    return m.c(x) * torch.rand(1, generator=m.generator)


def counter(m: Any, x: Tensor) -> Any:
    m.n += 1
    return m.c(x) * min(1.0, m.n / 10)


def counter_in_a_buffer(m: Any, x: Tensor) -> Any:
    if m.training:
        m.count += 1
    return m.c(x) * (1 + m.count)


def counter_in_a_tensor(m: Any, x: Tensor) -> Any:
    m.plain += 1
    return m.c(x) * m.plain


def buffer_filled(m: Any, x: Tensor) -> Any:
    y = m.c(x)
    if m.training:
        m.center.mul_(0.9).add_(0.1 * y.detach().mean((0, 2, 3)))
    return y - m.center[None, :, None, None]


def buffer_assigned(m: Any, x: Tensor) -> Any:
    y = m.c(x)
    if m.training:
        m.center = 0.9 * m.center + 0.1 * y.detach().mean((0, 2, 3))
    return y - m.center[None, :, None, None]


def no_grad(m: Any, x: Tensor) -> Any:
    with torch.no_grad():
        scale = m.d(x).mean()
    return m.c(x) * scale


def set_grad_enabled(m: Any, x: Tensor) -> Any:
    with torch.set_grad_enabled(not m.training):
        y = m.d(x)
    return m.c(x) + y


def inference_mode(m: Any, x: Tensor) -> Any:
    with torch.inference_mode():
        scale = float(m.d(x.detach()).mean())
    return m.c(x) * scale


def detached(m: Any, x: Tensor) -> Any:
    return m.c(x) + m.d(x).detach()


def feature_kept(m: Any, x: Tensor) -> Any:
    m.last = m.c(x)
    return m.last


def feature_in_a_list(m: Any, x: Tensor) -> Any:
    y = m.c(x)
    m.seen.append(y.detach())
    return y


def feature_in_a_dict(m: Any, x: Tensor) -> Any:
    y = m.c(x)
    m.config.last = y.detach()
    return y


def recomputed(m: Any, x: Tensor) -> Any:
    return checkpoint(lambda z: m.norm(m.c(z)), x, use_reentrant=False)


def recomputed_reentrant(m: Any, x: Tensor) -> Any:
    return checkpoint(m.c, x, use_reentrant=True)


def functional_dropout(m: Any, x: Tensor) -> Any:
    return F.dropout(m.c(x), 0.4, training=m.training)


def dropout_layers(m: Any, x: Tensor) -> Any:
    return m.d(F.dropout2d(m.drop(F.relu(m.norm(m.c(x)))), 0.2, training=m.drop.training))


def mode_of_a_layer(m: Any, x: Tensor) -> Any:
    return m.c(x) if m.norm.training else 2 * m.c(x)


def data_dependent(m: Any, x: Tensor) -> Any:
    return m.c(x) if float(x.detach().sum()) > 1e9 else m.d(x)


def size_of_the_batch(m: Any, x: Tensor) -> Any:
    return m.c(x) if x.shape[0] > 3 else m.d(x)


def written_through_a_view(m: Any, x: Tensor) -> Any:
    y = m.c(x)
    y[:, :2] += 1
    top = y[:, 2:4]
    top *= 0.5
    return y


def written_in_place(m: Any, x: Tensor) -> Any:
    y = m.c(x)
    z = y
    z += x
    return y.relu_() + F.relu(m.d(x), inplace=True)


def own_autocast(m: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.c(x)
    return y.to(x.dtype)


def weight_read(m: Any, x: Tensor) -> Any:
    weight = m.c.weight
    return F.conv2d(x, weight - weight.mean((1, 2, 3), keepdim=True), m.c.bias, padding=1)


def sizes_read(m: Any, x: Tensor) -> Any:
    return m.c(x).view(x.size(0), m.c.out_channels, -1).view(x.shape[0], 8, x.shape[2], -1)


def same_layer_twice(m: Any, x: Tensor) -> Any:
    return m.norm(m.c(F.relu(m.norm(m.c(x)))))


def tensors_made(m: Any, x: Tensor) -> Any:
    ramp = torch.arange(8.0)[None, :, None, None]
    return m.c(x) * ramp + torch.tensor(2.0)


def values_read(m: Any, x: Tensor) -> Any:
    return m.c(x) * m.alpha * m.config.alpha * SCALE * m.level


def sum_of_a_list(m: Any, x: Tensor) -> Any:
    return torch.add(input=sum([m.c(x), m.d(x)]), other=x).add(other=x)


def nothing_odd(m: Any, x: Tensor) -> Any:
    return m.d(F.relu(m.norm(m.c(x))))


KINDS = (
    layer_drop, random_scale_of_the_batch, random_scale_of_images, noise, python_random, numpy_random,
    own_generator, counter, counter_in_a_buffer, counter_in_a_tensor, buffer_filled, buffer_assigned, no_grad,
    set_grad_enabled, inference_mode, detached, feature_kept, feature_in_a_list, feature_in_a_dict,
    recomputed, recomputed_reentrant, functional_dropout, dropout_layers, mode_of_a_layer, data_dependent,
    size_of_the_batch, written_through_a_view, written_in_place, own_autocast, weight_read, sizes_read,
    same_layer_twice, tensors_made, values_read, nothing_odd, sum_of_a_list,
)  # fmt: skip
"""A new kind is a function above and a name here."""
LOWERED_WHOLE = {
    "noise", "detached", "functional_dropout", "dropout_layers", "mode_of_a_layer", "sizes_read",
    "same_layer_twice", "tensors_made", "values_read", "nothing_odd", "buffer_filled", "written_in_place",
    "random_scale_of_images", "sum_of_a_list",
}  # fmt: skip
"""Kinds that a graph holds: no module has to run as it is written."""
