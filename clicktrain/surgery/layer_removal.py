"""Residual branches that disappear because one of their convolutions has become zero (PruneTrain 4.1).

A branch is an operand of an addition with everything that only serves it. It disappears when its last
convolution adds nothing but its bias: the weights are zero, or everything that they read is. What the batch
norm behind it goes on adding is decided so:

* if that vanishes, while training and in evaluation, nothing stays and the addition adds one zero;
* otherwise the batch norm stays as a constant per channel (`layers.ConstantBatchNorm2d`): the network
  computes and trains exactly as with the zero weights, and the constant costs one broadcast addition. Folding
  it into another layer would be exact in one mode only, and not at borders.

A constant that a dead layer earlier in the branch sends into a living last convolution is no reason to remove
the branch: it may be anything. The activation after the addition stays in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from clicktrain.comm.sync_batch_norm import SYNCHRONIZED
from clicktrain.graph import changes_in_place
from clicktrain.surgery.graph import NetworkGraph
from clicktrain.surgery.plan import RemovedLayer
from clicktrain.surgery.values import Values

_REPLACED = ("conv", "norm", "prelu", "select")
_INSIDE = (*_REPLACED, "unary", "dropout", "pool")


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """A residual branch.

    Attributes:
        end: the operand.
        last: its last convolution.
        norm: the batch norm behind that; None if there is none.
        nodes: all that only serves the branch.
        refusal: why the branch cannot be taken out; None if it can.
        twin: the same branch in the graph of the training mode, where that is another graph.
    """

    addition: fx.Node
    end: fx.Node
    last: fx.Node
    norm: fx.Node | None
    nodes: frozenset[fx.Node]
    refusal: str | None
    twin: Branch | None = None

    @property
    def views(self) -> tuple[Branch, ...]:
        """The branch in each graph."""
        return (self,) if self.twin is None else (self, self.twin)

    @property
    def layers(self) -> frozenset[str]:
        """Modules that are called in it."""
        return frozenset(str(node.target) for node in self.nodes if node.op == "call_module")


def residual_branches(graph: NetworkGraph) -> tuple[Branch, ...]:
    """All operands of additions that end in a convolution, the larger one of an addition first."""
    branches = _branches(graph, graph.nodes)
    if graph.training is None:
        return tuple(branches)
    called = {str(node.target) for node in graph.training_nodes if node.op == "call_module"}
    twins = {branch.layers: branch for branch in _branches(graph, graph.training_nodes)}
    both = []
    for branch in branches:
        twin = twins.get(branch.layers)
        refusal = branch.refusal or (None if twin is None else twin.refusal)
        if twin is None and branch.layers & called:
            refusal = refusal or "its layers are called in another way while training"
        both.append(replace(branch, refusal=refusal, twin=twin))
    return tuple(both)


def _branches(graph: NetworkGraph, nodes: Sequence[fx.Node]) -> list[Branch]:
    branches: list[Branch] = []
    for node in nodes:
        name = str(getattr(node.target, "__name__", node.target)).rstrip("_").removeprefix("i")
        if graph.operation(node) != "binary" or name != "add" or node.kwargs:
            continue
        left, right = (*node.args, None, None)[:2]
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
            continue
        if graph.shapes.get(left) != graph.shapes.get(right) or len(graph.shapes[node]) != 4:
            continue
        both = [branch for end in (left, right) if (branch := _branch(graph, nodes, node, end))]
        branches += sorted(both, key=lambda branch: -len(branch.nodes))
    return branches


def removable_branches(graph: NetworkGraph, values: Values, threshold: float) -> dict[Branch, str | None]:
    """Branches whose last convolution adds nothing, with the reason why one stays all the same (or None)."""
    removable: dict[Branch, str | None] = {}
    additions: set[fx.Node] = set()
    for branch in residual_branches(graph):
        contributions = [values.contribution.get(view.last) for view in branch.views]
        if any(c is None or bool((c > threshold).any()) for c in contributions):
            continue
        reason = branch.refusal
        grows = any(bool((values.of[view.end].radius > threshold).any()) for view in branch.views)
        if reason is None and grows:
            reason = "its batch norm makes weights under the threshold large again: set them to zero first"
        if reason is None and branch.addition in additions:
            reason = "the other operand of the addition has gone already"
        if reason is None:
            additions.add(branch.addition)
        removable[branch] = reason
    return removable


def replacements(
    graph: NetworkGraph, branch: Branch, values: Values, threshold: float
) -> tuple[RemovedLayer, ...]:
    """What becomes of each layer of a removable branch that has parameters."""
    vanishes = all(
        bool((values.of[node].size <= threshold).all())
        for view in branch.views
        for node in (view.end, view.norm or view.last)
    )
    writable = any(_written_into(graph, view) for view in branch.views)
    removed = []
    for node in graph.nodes:
        if node not in branch.nodes or node.op != "call_module":
            continue
        name, word = str(node.target), graph.operation(node)
        if node is branch.norm:
            plain = vanishes and not writable
            removed.append(RemovedLayer(name, "nothing" if plain else "constant", writable))
        elif node is branch.last:
            biased = getattr(graph.module(node), "bias", None) is not None
            kept = biased and not (vanishes and not writable)
            removed.append(RemovedLayer(name, "bias" if kept else "zeros", writable))
        elif word == "conv":
            removed.append(RemovedLayer(name, "zeros"))
        elif word in ("norm", "prelu", "select"):
            removed.append(RemovedLayer(name, "nothing"))
    return tuple(removed)


def _branch(graph: NetworkGraph, order: Sequence[fx.Node], addition: fx.Node, end: fx.Node) -> Branch | None:
    """Walk back from the operand to the last convolution, and collect what only serves it."""
    if set(end.users) != {addition}:
        return None
    node, norm = end, None
    while (word := graph.operation(node)) in ("unary", "dropout", "norm") and norm is None:
        norm = node if word == "norm" else None
        node = node.all_input_nodes[0]
        if len(node.users) != 1:
            return None
    if graph.operation(node) != "conv" or type(graph.module(node)) is not nn.Conv2d:
        return None
    nodes = {end}
    for candidate in reversed(order):
        if candidate.op != "placeholder" and candidate.users and set(candidate.users) <= nodes:
            nodes.add(candidate)
    refusal = _refusal(graph, order, nodes, addition, end, norm or node)
    return Branch(addition, end, node, norm, frozenset(nodes), refusal)


def _refusal(
    graph: NetworkGraph,
    order: Sequence[fx.Node],
    nodes: set[fx.Node],
    addition: fx.Node,
    end: fx.Node,
    behind: fx.Node,
) -> str | None:
    calls = [str(node.target) for node in order if node.op == "call_module"]
    for node in order:
        if node not in nodes:
            continue
        word = graph.operation(node)
        if word not in _INSIDE:
            return f"{graph.words(node)} in the branch does more than pass its input on"
        if word not in _REPLACED:
            continue
        module = graph.module(node)
        registered = sum(m is module for _, m in graph.model.named_modules(remove_duplicate=False))
        if calls.count(str(node.target)) > 1 or registered > 1:
            return f"{node.target} is used elsewhere too"
        plain = type(module) is nn.Conv2d and not isinstance(module.padding, str)
        if word == "conv" and not plain:
            return f"{node.target} is not a 2-D convolution with its padding in numbers"
        if word == "norm" and type(module) not in (nn.BatchNorm2d, *SYNCHRONIZED):
            return f"{node.target} is a {type(module).__name__}"
    full = graph.operation(behind) == "norm" or getattr(graph.module(behind), "bias", None) is not None
    if not full and changes_in_place(addition) and addition.args[0] is end:
        return "the addition is done in place, into the branch, which has neither batch norm nor bias"
    return None


def _written_into(graph: NetworkGraph, branch: Branch) -> bool:
    """Whether something behind the last layer works in place."""
    node = branch.norm or branch.last
    while node is not branch.end:
        node = next(iter(node.users))
        module = graph.module(node) if node.op == "call_module" else None
        inplace = getattr(module, "inplace", False) is True or node.kwargs.get("inplace") is True
        if inplace or (node.op == "call_method" and str(node.target).endswith("_")):
            return True
    return changes_in_place(branch.addition) and branch.addition.args[0] is branch.end
