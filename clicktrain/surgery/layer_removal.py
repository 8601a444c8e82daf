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

from dataclasses import dataclass

from torch import fx, nn

from clicktrain.surgery.graph import ModelGraph, changes_in_place
from clicktrain.surgery.operations import operation, words
from clicktrain.surgery.plan import RemovedLayer
from clicktrain.surgery.values import Values

_REPLACED = ("conv", "norm", "prelu", "select")
_INSIDE = (*_REPLACED, "unary", "dropout", "pool")


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """A residual branch.

    Attributes:
        addition: the node that adds it.
        end: the operand.
        last: its last convolution.
        norm: the batch norm behind that; None if there is none.
        nodes: all that only serves the branch.
        refusal: why the branch cannot be taken out; None if it can.
    """

    addition: fx.Node
    end: fx.Node
    last: fx.Node
    norm: fx.Node | None
    nodes: frozenset[fx.Node]
    refusal: str | None


def residual_branches(graph: ModelGraph) -> tuple[Branch, ...]:
    """All operands of additions that end in a convolution, the larger one of an addition first."""
    found: list[Branch] = []
    for node in graph.nodes:
        name = str(getattr(node.target, "__name__", node.target)).rstrip("_").removeprefix("i")
        if operation(graph, node) != "binary" or name != "add" or node.kwargs:
            continue
        left, right = (*node.args, None, None)[:2]
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
            continue
        if graph.shapes.get(left) != graph.shapes.get(right) or len(graph.shapes[node]) != 4:
            continue
        both = [branch for end in (left, right) if (branch := _branch(graph, node, end)) is not None]
        found += sorted(both, key=lambda branch: -len(branch.nodes))
    return tuple(found)


def removable_branches(graph: ModelGraph, values: Values, threshold: float) -> dict[Branch, str | None]:
    """Branches whose last convolution adds nothing, with the reason why one stays all the same (or None)."""
    found: dict[Branch, str | None] = {}
    additions: set[fx.Node] = set()
    for branch in residual_branches(graph):
        contribution = values.contribution.get(branch.last)
        if contribution is None or bool((contribution > threshold).any()):
            continue
        reason = branch.refusal
        if reason is None and bool((values.of[branch.end].radius > threshold).any()):
            reason = "its batch norm makes weights under the threshold large again: set them to zero first"
        if reason is None and branch.addition in additions:
            reason = "the other operand of the addition has gone already"
        if reason is None:
            additions.add(branch.addition)
        found[branch] = reason
    return found


def remnants(graph: ModelGraph, branch: Branch, values: Values, threshold: float) -> tuple[RemovedLayer, ...]:
    """What becomes of each layer of a removable branch that has parameters."""
    vanishes = bool((values.of[branch.end].size <= threshold).all()) and bool(
        (values.of[branch.norm or branch.last].size <= threshold).all()
    )
    writable = _written_into(graph, branch)
    removed = []
    for node in graph.nodes:
        if node not in branch.nodes or node.op != "call_module":
            continue
        name, word = str(node.target), operation(graph, node)
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


def _branch(graph: ModelGraph, addition: fx.Node, end: fx.Node) -> Branch | None:
    """Walk back from the operand to the last convolution, and collect what only serves it."""
    if set(end.users) != {addition}:
        return None
    node, norm = end, None
    while (word := operation(graph, node)) in ("unary", "dropout", "norm") and norm is None:
        norm = node if word == "norm" else None
        node = node.all_input_nodes[0]
        if len(node.users) != 1:
            return None
    if operation(graph, node) != "conv" or type(graph.module(node)) is not nn.Conv2d:
        return None
    nodes = {end}
    for candidate in reversed(graph.nodes):
        if candidate.op != "placeholder" and candidate.users and set(candidate.users) <= nodes:
            nodes.add(candidate)
    return Branch(
        addition, end, node, norm, frozenset(nodes), _refusal(graph, nodes, addition, end, norm or node)
    )


def _refusal(
    graph: ModelGraph, nodes: set[fx.Node], addition: fx.Node, end: fx.Node, behind: fx.Node
) -> str | None:
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if node not in nodes:
            continue
        word = operation(graph, node)
        if word not in _INSIDE:
            return f"{words(graph, node)} in the branch does more than pass its input on"
        if word not in _REPLACED:
            continue
        module = graph.module(node)
        if calls.count(str(node.target)) > 1 or _registered(graph.model, module) > 1:
            return f"{node.target} is used elsewhere too"
        plain = type(module) is nn.Conv2d and not isinstance(module.padding, str)
        if word == "conv" and not plain:
            return f"{node.target} is not a 2-D convolution with its padding in numbers"
        if word == "norm" and type(module) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
            return f"{node.target} is a {type(module).__name__}"
    full = operation(graph, behind) == "norm" or getattr(graph.module(behind), "bias", None) is not None
    if not full and changes_in_place(addition) and addition.args[0] is end:
        return "the addition is done in place, into the branch, which has neither batch norm nor bias"
    return None


def _registered(model: nn.Module, module: nn.Module) -> int:
    return sum(m is module for _, m in model.named_modules(remove_duplicate=False))


def _written_into(graph: ModelGraph, branch: Branch) -> bool:
    """Whether something behind the last layer works in place."""
    node = branch.norm or branch.last
    while node is not branch.end:
        node = next(iter(node.users))
        module = graph.module(node) if node.op == "call_module" else None
        inplace = getattr(module, "inplace", False) is True or node.kwargs.get("inplace") is True
        if inplace or (node.op == "call_method" and str(node.target).endswith("_")):
            return True
    return changes_in_place(branch.addition) and branch.addition.args[0] is branch.end
