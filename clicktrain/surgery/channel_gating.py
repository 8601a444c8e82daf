"""Channel gating: a residual branch works on its own channels only (PruneTrain 4.2, figure 5b).

In front of the branch's first convolutions the channels that they read are selected; behind its last one (and
the batch norm) its channels are put at their places in the stage, zeros elsewhere. It removes more than
channel union, which comes first, and pays with a copy at both ends.

A filter of the last convolution goes if it adds nothing to the stage, its batch norm's constant included.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, fx, nn

from clicktrain.surgery.groups import Dependencies
from clicktrain.surgery.layer_removal import Branch, residual_branches
from clicktrain.surgery.plan import Cut, Gate
from clicktrain.surgery.values import Values

Cuts = dict[tuple[str, int], Cut]


def gate_branches(
    deps: Dependencies,
    values: Values,
    threshold: float,
    masks: list[Tensor],
    cuts: Cuts,
    removed: Collection[Branch],
    round_to: int = 1,
) -> tuple[Cuts, tuple[Gate, ...]]:
    """Narrow the ends of residual branches further than the union of their stage.

    Args:
        deps, values, threshold: as in `channel_union.dead_channels`.
        masks, cuts: what channel union decided; per group bool [size], True = stays.
        round_to: gated widths become multiples of it.

    Returns:
        The cuts with narrower ends, and the gates.
    """
    result, gates = dict(cuts), []
    unread = {edge.node: edge.unread for edge in values.edges}
    gated: set[fx.Node] = {node for branch in removed for node in branch.nodes}
    for branch in residual_branches(deps.graph):
        if branch.refusal is not None or branch.last in gated:
            continue
        for node in deps.graph.nodes:
            head = node in branch.nodes and _plain(deps, node) and node not in gated
            if head and node.all_input_nodes[0] not in branch.nodes:
                stays = _stays(deps, node.all_input_nodes[0], masks)
                wanted = _rounded(deps, node, 1, stays, stays & ~unread[node], round_to)
                if not torch.equal(wanted, stays):
                    gates.append(_gate(str(node.target), "select", stays, wanted))
                    _narrow(result, f"{node.target}.weight", 1, wanted)
                    gated.add(node)
        if _plain(deps, branch.last):
            behind = branch.norm or branch.last
            stays = _stays(deps, branch.last, masks)
            ends = [node for view in branch.views for node in (view.norm or view.last, view.end)]
            adds = torch.stack([values.of[node].size for node in ends]).amax(0) > threshold
            wanted = _rounded(deps, branch.last, 0, stays, stays & adds, round_to)
            if not torch.equal(wanted, stays):
                gates.append(_gate(str(behind.target), "scatter", stays, wanted))
                for layer in {branch.last, behind}:
                    for leaf in ("weight", "bias", "running_mean", "running_var"):
                        if isinstance(getattr(deps.graph.module(layer), leaf, None), Tensor):
                            _narrow(result, f"{layer.target}.{leaf}", 0, wanted)
                gated.add(branch.last)
    return result, tuple(gates)


def _plain(deps: Dependencies, node: fx.Node) -> bool:
    if deps.graph.operation(node) != "conv":
        return False
    module = deps.graph.module(node)
    return type(module) is nn.Conv2d and module.groups == 1


def _stays(deps: Dependencies, node: fx.Node, masks: list[Tensor]) -> Tensor:
    places = deps.places(node)
    return torch.tensor([place is None or bool(masks[place[0]][place[1]]) for place in places])


def _rounded(
    deps: Dependencies, node: fx.Node, dim: int, stays: Tensor, wanted: Tensor, round_to: int
) -> Tensor:
    """At least one channel, and a multiple where there are enough: the largest of the others come back."""
    count = int(wanted.sum())
    goal = min(-(-max(count, 1) // round_to) * round_to, int(stays.sum()))
    if goal <= count:
        return wanted
    weight = deps.graph.module(node).weight
    assert isinstance(weight, Tensor)
    size = weight.detach().abs().transpose(0, dim).flatten(1).amax(1).double().cpu()
    size = size.masked_fill(~stays | wanted, -1.0)
    wanted = wanted.clone()
    wanted[torch.sort(size, descending=True, stable=True).indices[: goal - count]] = True
    return wanted


def _gate(name: str, kind: str, stays: Tensor, wanted: Tensor) -> Gate:
    channels = tuple(wanted[stays].nonzero().flatten().tolist())
    return Gate(name, "select" if kind == "select" else "scatter", channels, int(stays.sum()))


def _narrow(cuts: Cuts, name: str, dim: int, wanted: Tensor) -> None:
    cuts[name, dim] = Cut(name, dim, tuple(wanted.nonzero().flatten().tolist()), wanted.numel())
