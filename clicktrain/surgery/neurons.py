"""The neurons of a network: output channels, joined with those they can only be removed together with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clicktrain.comm.sync_batch_norm import SYNCHRONIZED
from clicktrain.errors import UserError
from clicktrain.graph.adapters import nearest_adapter
from clicktrain.graph.prunable import matches
from clicktrain.surgery import ChannelGroup, Member, SurgeryPlan
from clicktrain.surgery.groups import Dependencies

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, *SYNCHRONIZED)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The entries of one parameter that belong to each neuron of a group.

    ``index`` [n, k] along ``dim``; ``plain``: neuron n is index n of the whole dimension.
    """

    name: str
    dim: int
    index: Tensor
    plain: bool

    @classmethod
    def of(cls, member: Member) -> Rows:
        """The rows of a member of a group of channels."""
        index = torch.tensor(member.indices)
        plain = index.shape[1] == 1 and torch.equal(index[:, 0], torch.arange(len(index)))
        return cls(member.name, member.dim, index, plain)

    def take(self, tensor: Tensor) -> Tensor:
        """[n, everything of a neuron] of a tensor of the parameter's shape, in float32 or better."""
        rows = tensor.detach().transpose(0, self.dim)
        if not (self.plain and len(rows) == len(self.index)):
            rows = rows[self.index.to(tensor.device)]
        return rows.reshape(len(self.index), -1).to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True, slots=True, eq=False)
class NeuronGroup:
    """Neurons of one layer, or of several layers whose filters can only be removed together.

    ``layers`` are the modules whose outputs they are, ``filters`` the weights of these in the same order,
    ``scales`` and ``shifts`` parameters of the batch norms that follow. See `surgery.groups.ChannelGroup`.
    """

    name: str
    layers: tuple[str, ...]
    size: int
    filters: tuple[Rows, ...]
    scales: tuple[Rows, ...]
    shifts: tuple[Rows, ...]

    @property
    def filters_each(self) -> int:
        """Filters of one neuron."""
        return sum(rows.index.shape[1] for rows in self.filters)


def neuron_groups(
    network: Dependencies,
    exclude: Sequence[str] = (),
    trained: Callable[[Tensor], bool] = lambda weight: True,
) -> tuple[tuple[NeuronGroup, ...], dict[str, str]]:
    """Groups whose neurons may be pruned, and why the others may not.

    Args:
        network: the dependencies between the channels of a network.
        exclude: module paths (shell-style) whose outputs stay as they are.
        trained: whether a parameter is trained; neurons of other layers stay.

    Returns:
        The groups in the order of the network; name of a group -> reason.

    Raises:
        UserError: an entry of ``exclude`` names no layer.
    """
    modules = dict(network.graph.model.named_modules())
    named = [name for name, module in modules.items() if nearest_adapter(module) is not None]
    for glob in exclude:
        if not any(matches(name, [glob]) for name in named):
            raise UserError(f"no layer is called {glob!r}; the layers are {', '.join(named[:8])}")
    groups: list[NeuronGroup] = []
    reasons: dict[str, str] = {}
    for channels in network.groups:
        group = _group(channels, modules)
        weights = [network.graph.model.get_parameter(rows.name) for rows in group.filters]
        if channels.fixed is not None or not group.filters:
            reasons[group.name] = channels.fixed or "no filters make these channels"
        elif any(matches(layer, exclude) for layer in group.layers):
            reasons[group.name] = "excluded"
        elif not all(weight.requires_grad and trained(weight) for weight in weights):
            reasons[group.name] = "its weights are not trained"
        elif group.size == 1:
            reasons[group.name] = "its only neuron"
        else:
            groups.append(group)
    return tuple(groups), reasons


def _group(channels: ChannelGroup, modules: Mapping[str, nn.Module]) -> NeuronGroup:
    layers: list[str] = []
    rows: dict[str, list[Rows]] = {"filters": [], "weight": [], "bias": []}
    for member in channels.members:
        path, _, leaf = member.name.rpartition(".")
        module = modules.get(path)
        adapter = None if module is None else nearest_adapter(module)
        if adapter is not None and (leaf, member.dim) == ("weight", adapter.out_axis):
            layers.append(path)
            rows["filters"].append(Rows.of(member))
        elif isinstance(module, _NORMS) and leaf in ("weight", "bias"):
            rows[leaf].append(Rows.of(member))
    return NeuronGroup(channels.name, tuple(layers), channels.size, *map(tuple, rows.values()))


def widths(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Kept neurons of each group."""
    return {name: int(mask.sum()) for name, mask in masks.items()}


def count_pruned(masks: Mapping[str, Tensor]) -> int:
    """Pruned neurons of all groups."""
    return sum(int((~mask).sum()) for mask in masks.values())


def shuffled(masks: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """As many neurons of each group, drawn at random (When to Prune? 4.5, "similar structures")."""
    generator = torch.Generator().manual_seed(seed)
    return {name: mask[torch.randperm(len(mask), generator=generator)] for name, mask in masks.items()}


def masks_of_recipe(groups: Sequence[NeuronGroup], plans: Sequence[SurgeryPlan]) -> dict[str, Tensor]:
    """The neurons that surgery plans, one after the other, leave of a network of the same class.

    Args:
        groups: neurons of the unpruned network.
        plans: as in a run's ``surgery.json``.

    Returns:
        Group -> bool [n], True = kept.

    Raises:
        UserError: the plans are for another network, or remove more than channels.
    """
    kept: dict[tuple[str, int], list[int]] = {}
    for plan in plans:
        if plan.removed_layers or plan.gates:
            raise UserError("the structure has removed layers or gates: only channels can be taken over")
        for cut in plan.cuts:
            before = kept.get((cut.name, cut.dim), list(range(cut.size)))
            if len(before) != cut.size:
                raise UserError(f"the structure's plans do not follow each other at {cut.name}")
            kept[cut.name, cut.dim] = [before[i] for i in cut.keep]
    masks, used = {}, 0
    for group in groups:
        rows = group.filters[0]
        keep = kept.get((rows.name, rows.dim))
        masks[group.name] = torch.ones(group.size, dtype=torch.bool)
        if keep is not None:
            masks[group.name] = torch.isin(rows.index[:, 0], torch.tensor(keep))
            used += not bool(masks[group.name].all())
    if any(plans) and not used:
        raise UserError("the structure was made for another network: it cuts none of the layers of this one")
    return masks
