"""Learning rates that differ from layer to layer: by depth, and by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping

from torch import nn

from clicktrain.errors import UserError, shown

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def depths(model: nn.Module) -> list[list[str]]:
    """The names of the network's parameters by depth, from the input on: one list for each block.

    Blocks are the parts of the network in the order in which it holds them; containers (Sequential, ...) are
    opened, and so is a part that is all there is. What has only vectors (batch norm) belongs to the block
    before it. In a ResNet that is the first convolution, each residual block, and the classifier.
    """
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    blocks: list[list[str]] = []
    for part in _parts(model):
        own = {id(p): p for p in part.parameters()}
        names = [named.pop(key) for key in own if key in named]  # what is shared belongs to the first
        if not names:
            continue
        if blocks and all(p.ndim <= 1 for p in own.values()):
            blocks[-1] += names
        else:
            blocks.append(names)
    rest = list(named.values())  # parameters of the network itself or of an opened container: a token, ...
    if rest:
        blocks[:1] = [rest + blocks[0]] if blocks else [rest]
    return blocks


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    children = _with_parameters(model)
    while len(children) == 1 and _with_parameters(children[0]):
        children = _with_parameters(children[0])
    for child in children or [model]:
        yield from _opened(child)


def _opened(module: nn.Module) -> Iterator[nn.Module]:
    if not isinstance(module, _CONTAINERS):
        yield module
        return
    for child in _with_parameters(module):
        yield from _opened(child)


def _with_parameters(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if next(child.parameters(), None) is not None]


def rate_factors(model: nn.Module, decay: float, by_name: Mapping[str, float]) -> dict[str, float]:
    """Factor on the learning rate of each parameter, by name.

    Args:
        model: the network.
        decay: factor from one depth to the next one towards the input (`depths`); the last has 1.
        by_name: shell patterns of parameters' names and further factors; all that fit count.

    Raises:
        UserError: a pattern that fits no parameter.
    """
    factors = {name: 1.0 for name, _ in model.named_parameters()}
    if decay != 1:
        blocks = depths(model)
        for depth, names in enumerate(blocks):
            factors |= dict.fromkeys(names, decay ** (len(blocks) - 1 - depth))
    for pattern, factor in by_name.items():
        fitting = [name for name in factors if fnmatch.fnmatchcase(name, pattern)]
        if not fitting:
            raise _unknown(pattern, list(factors))
        for name in fitting:
            factors[name] *= factor
    return factors


def _unknown(pattern: str, names: list[str]) -> UserError:
    few = ", ".join(dict.fromkeys(name.split(".")[0] + ".*" for name in names if "." in name))
    return UserError(f"layer_rates has {shown(pattern)}, which fits no parameter: this network has {few}")
