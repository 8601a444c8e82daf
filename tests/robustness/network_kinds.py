"""Small networks, one for each kind of thing that a forward pass may do beside convolutions in a row.

Every one has a plain part, ``inner``, whose channels can go whatever the rest does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, CLASSES = 8, 5


def conv_bn(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Kind(nn.Module):
    """Stem, something special in the middle, a plain part, a head."""

    special: nn.Module

    def __init__(self, outputs: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.inner = (
            conv_bn(3, WIDTH),
            nn.Sequential(conv_bn(outputs, WIDTH), conv_bn(WIDTH, WIDTH)),
        )
        self.fc = nn.Linear(WIDTH, CLASSES)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(self.inner(x).mean((2, 3)))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.special(self.stem(x)))


# ---- layers of one mode only


class AuxiliaryHead(Kind):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Conv2d(WIDTH, CLASSES, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        aux = self.aux(x).mean((2, 3)) if self.training else None
        y = self.head(x)
        return (y, aux) if self.training else y


class DeepSupervision(Kind):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Conv2d(WIDTH, CLASSES, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.inner[0](x)
        early = [head(part).mean((2, 3)) for head, part in zip(self.heads, (x, y), strict=True)]
        last = self.fc(self.inner[1](y).mean((2, 3)))
        return {"out": last, "early": early} if self.training else {"out": last}


class FeaturesForALoss(Kind):
    def forward(self, x: Tensor) -> Any:
        features = self.stem(x)
        return (self.head(features), features) if self.training else self.head(features)


class EvaluationOnly(Kind):
    def __init__(self) -> None:
        super().__init__()
        self.calibrate = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.head(x if self.training else self.calibrate(x))


class AuxiliaryBranch(Kind):
    """A residual branch whose inside another head reads while training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(WIDTH, WIDTH), conv_bn(WIDTH, WIDTH)
        self.aux = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.first(x)
        out = self.head(F.relu(x + self.second(y)))
        return (out, self.aux(y.mean((2, 3)))) if self.training else out


# ---- numbers of a layer in forward


class OutChannels(Kind):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.stem(x) / self.stem[0].out_channels)


class InFeatures(Kind):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.stem(x)) * self.fc.in_features**-0.5


class WeightShape(Kind):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.stem(x)) * self.inner[0][0].weight.shape[1] ** -0.5


class WeightSize(Kind):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.stem(x)) / self.inner[0][0].weight.size(1)


class WeightNumel(Kind):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.stem(x)) / self.stem[0].weight.numel()


class NumFeatures(Kind):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.stem(x) + 1.0 / self.stem[1].num_features)


class LengthOfWeight(Kind):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.stem(x)) / len(self.stem[0].weight)


class InputShape(Kind):
    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.head(x / x.shape[1])


class NumberBehindAFunction(Kind):
    """Nothing of it is seen in a graph: a plain function works it out of the layer's own list of sizes."""

    def forward(self, x: Tensor) -> Any:
        return self.head(self.stem(x) * _fan(self.__dict__["_modules"]["stem"][0]))


def _fan(layer: nn.Module) -> float:
    sizes = layer._parameters["weight"].detach().numpy().shape  # type: ignore[union-attr]
    return float(sizes[0]) ** -0.5


# ---- layers of other kinds


class NormAct(nn.BatchNorm2d):
    """As timm's: a batch norm with a forward of its own and an activation inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"4 dimensions, not {x.ndim}")
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        return self.act(self.drop(x))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class Scale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(channels, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class SameConv(nn.Conv2d):
    """A forward of its own that does what its parent does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.mean() > -1e9 else x


class StochasticDepth(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.8)
        return x * kept / 0.8


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s + x * s * (1 - s))


class OwnFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Swish.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        return x + self.attention(y, y, y, need_weights=False)[0].transpose(1, 2).reshape(n, c, h, w)


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,dc->ndhw", x, self.mix)


class Matmul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(2)
        return x + (torch.softmax(y @ y.transpose(1, 2), -1) @ y).view_as(x)


class Chunked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return torch.cat((b * torch.sigmoid(a), a), 1)


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.second = conv_bn(WIDTH // 2, WIDTH // 2)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.split(x.shape[1] // 2, dim=1)
        return torch.cat([first, self.second(second)], dim=1)


class Shuffled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(4, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


def _depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False), nn.BatchNorm2d(WIDTH)
    )


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm with activation": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), NormAct(WIDTH)),
    "layer norm over channels": lambda: LayerNorm2d(WIDTH),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "group norm per channel": lambda: nn.GroupNorm(WIDTH, WIDTH),
    "instance norm": lambda: nn.InstanceNorm2d(WIDTH, affine=True),
    "scale per channel": lambda: Scale(WIDTH),
    "standardised convolution": lambda: StandardisedConv(WIDTH, WIDTH, 3, padding=1),
    "convolution written again": lambda: SameConv(WIDTH, WIDTH, 3, padding=1),
    "branch on data": DataDependent,
    "stochastic depth": StochasticDepth,
    "dropout": lambda: nn.Sequential(nn.Dropout(0.3), nn.Dropout2d(0.2)),
    "autograd function": OwnFunction,
    "attention": Attention,
    "einsum": Einsum,
    "matmul": Matmul,
    "chunk": Chunked,
    "split": Split,
    "channel shuffle": Shuffled,
    "squeeze-excite": SqueezeExcite,
    "depthwise": _depthwise,
    "transposed convolution": lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2),
    "grouped convolution": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2),
    "softmax over channels": lambda: nn.Softmax(1),
    "local response norm": lambda: nn.LocalResponseNorm(3),
    "interpolation": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "circular padding": lambda: nn.CircularPad2d(1),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(WIDTH, WIDTH, 1)),
}


class PixelShuffled(Kind):
    def __init__(self) -> None:
        super().__init__(WIDTH // 4)
        self.special = nn.PixelShuffle(2)


# ---- inputs


class Conditioned(Kind):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)

    def forward(self, pixel_values: Any, cond: Tensor | None = None, scale: float = 1.0) -> Any:
        if isinstance(pixel_values, dict):
            pixel_values = pixel_values["image"][0]
        x = self.stem(pixel_values)
        if cond is not None:
            x = x + self.embed(cond)[:, :, None, None]
        return {"logits": self.head(x) * scale}


WHOLE: tuple[type[Kind], ...] = (
    AuxiliaryHead, DeepSupervision, FeaturesForALoss, EvaluationOnly, AuxiliaryBranch, OutChannels,
    InFeatures, WeightShape, WeightSize, WeightNumel, NumFeatures, LengthOfWeight, InputShape,
    NumberBehindAFunction, PixelShuffled,
)  # fmt: skip
INPUTS = ("kw", "dict", "two", "all")
NAMES = (*(kind.__name__ for kind in WHOLE), *LAYERS, *(f"inputs: {form}" for form in INPUTS))


def network(name: str) -> nn.Module:
    """In float64, with batch norms that have seen something."""
    model: Kind
    if name in LAYERS:
        model = Kind()
        model.special = LAYERS[name]()
    elif name.startswith("inputs: "):
        model = Conditioned()
    else:
        model = {kind.__name__: kind for kind in WHOLE}[name]()
    model.double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
                module.bias.normal_(0, 0.3)
    return model


def inputs(name: str, images: int = 4) -> Any:
    """What `network` is called with, as ``example=`` takes it."""
    x, cond = torch.randn(images, 3, 8, 8).double(), torch.randn(images, 4).double()
    return {
        "inputs: kw": {"pixel_values": x},
        "inputs: dict": ({"image": [x]},),
        "inputs: two": (x, cond),
        "inputs: all": {"pixel_values": {"image": [x]}, "cond": cond, "scale": 0.5},
    }.get(name, x)
