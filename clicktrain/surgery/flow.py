"""How channels flow through the graph: which indices of which tensors an operation ties together.

One rule per word of `operations.operation`. What no rule understands keeps the channels that go into it, with
the reason; its result has channels of its own, fixed too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from clicktrain.graph import Read
from clicktrain.surgery.atoms import Atoms, Channels, SizeOf
from clicktrain.surgery.graph import NetworkGraph
from clicktrain.surgery.layers import ChannelSelect
from clicktrain.surgery.operations import layer_kind
from clicktrain.surgery.probing import channel_tensors, keeps_channels, module_keeps_channels
from clicktrain.surgery.reshaping import (
    UnclearError,
    expand,
    getitem,
    permute,
    reduced,
    reshape,
    squeeze,
    unsqueeze,
)

SIZES_OF_LAYERS = (
    "in_channels", "out_channels", "num_features", "in_features", "out_features", "num_parameters", "groups",
)  # fmt: skip
"""What layers note about their shape, and surgery changes."""


class ChannelFlow:
    """Walks the graph of each mode once; tensors, and so layers, are the same in both.

    Attributes:
        channels: of every value that is a tensor with channels.
        sizes: numbers that depend on a number of channels.
        unclear: nodes that no rule understood; their results have channels of their own.
        per_channel: nodes that no rule knows, but that were found to work inside each channel.
    """

    def __init__(self, graph: NetworkGraph) -> None:
        self.graph = graph
        self.atoms = Atoms(graph.model)
        self.channels: dict[fx.Node, Channels] = {}
        self.sizes: dict[fx.Node, SizeOf] = {}
        self.unclear: set[fx.Node] = set()
        self.per_channel: set[fx.Node] = set()
        self._whole_shapes: dict[fx.Node, Channels] = {}
        self._attributes: dict[fx.Node, Tensor] = {}
        rules: dict[str, Callable[[fx.Node], Channels | None]] = {
            "input": self._input,
            "conv": self._conv,
            "conv_transpose": self._conv,
            "linear": self._linear,
            "norm": self._norm,
            "constant_norm": self._norm,
            "prelu": self._prelu,
            "unary": self._same,
            "dropout": self._same,
            "pool": self._pool,
            "binary": self._binary,
            "cat": self._cat,
            "select": self._select,
            "scatter": self._scatter,
            "removed_conv": self._removed_conv,
            "create": self._create,
        }
        for node in graph.all_nodes:
            if node.op == "output":
                self._fix_inputs(node, "it is an output of the network")
            elif node.op == "get_attr":
                self._attribute(node)
            elif node not in graph.shapes and (node in graph.sizes or node.target is getattr):
                self._size(node)
            else:
                self._step(node, rules.get(graph.operation(node)))
        for calls in graph.passes:
            for read in calls.reads:
                self._number_read(read)

    def _step(self, node: fx.Node, rule: Callable[[fx.Node], Channels | None] | None) -> None:
        word = self.graph.operation(node)
        try:
            self._refuse_sizes(node, word)
            if rule is None and word in _SHAPED:
                channels = _SHAPED[word](self, node, self._from(node))
            else:
                channels = (rule or self._tried)(node)
        except UnclearError as unclear:
            self.unclear.add(node)
            self._fix_inputs(node, str(unclear))
            if node.op == "call_module":
                self._fix_module(self.graph.module(node), str(unclear))
            channels = self._unclear_result(node, f"it comes out of: {unclear}")
        if channels is not None:
            self.channels[node] = channels

    def _unclear_result(self, node: fx.Node, reason: str) -> Channels | None:
        """Channels of its own: where the input had them if the shape is the same, else along dimension 1."""
        shape = self.graph.shapes.get(node, ())
        if len(shape) < 2:
            return None
        alike = [s for s in node.all_input_nodes if s in self.channels and self.graph.shapes[s] == shape]
        dim = self.channels[alike[0]].dim if alike else 1
        return Channels(dim, self.atoms.fresh(shape[dim], reason))

    def _size(self, node: fx.Node) -> None:
        """Numbers that come from shapes; arithmetic on them goes on depending on the channels."""
        ids: list[int] = []
        exact = True
        if node.target is getattr and node.args[1] != "shape":
            return
        for source in node.all_input_nodes:
            if source in self.channels:
                channels = self.channels[source]
                whole, name = node.args[1:] in ((), ("shape",)), str(node.target)
                dim = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], int) else None
                if whole and name not in ("numel", "nelement", "dim", "ndimension"):
                    self._whole_shapes[node] = channels
                    return
                other = dim is not None and dim % len(self.graph.shapes[source]) != channels.dim
                if other or name in ("dim", "ndimension"):
                    continue
                ids, exact = [*ids, *channels.ids], exact and dim is not None
            elif source in self._attributes:
                reason = f"the shape of {source.target} is read in forward"
                self._fix_tensor(self._attributes[source], reason)
            elif source in self._whole_shapes:
                channels = self._whole_shapes[source]
                index = node.args[1] if node.op == "call_function" and len(node.args) > 1 else None
                if isinstance(index, int) and index % len(self.graph.sizes[source]) != channels.dim:
                    continue
                ids, exact = [*ids, *channels.ids], exact and isinstance(index, int)
            elif source in self.sizes:
                ids, exact = [*ids, *self.sizes[source].ids], False
        if ids:
            self.sizes[node] = SizeOf(tuple(ids), exact)

    def _refuse_sizes(self, node: fx.Node, word: str) -> None:
        """A number of channels may say what shape a value has, nothing else (a scale would change)."""
        if word in ("reshape", "expand"):
            return
        for source in node.all_input_nodes:
            if source in self.sizes or source in self._whole_shapes:
                raise UnclearError(f"{self.graph.words(node)} computes with the number of channels")

    def _fix_inputs(self, node: fx.Node, reason: str) -> None:
        for source in node.all_input_nodes:
            tables = (self.channels, self.sizes, self._whole_shapes)
            known = next((table[source] for table in tables if source in table), None)
            if known is not None:
                self.atoms.fix(known.ids, reason)
            elif source in self._attributes:
                self._fix_tensor(self._attributes[source], reason)

    def _fix_module(self, module: nn.Module, reason: str) -> None:
        for tensor in (*module.parameters(), *module.buffers()):
            self._fix_tensor(tensor, reason)

    def _fix_tensor(self, tensor: Tensor, reason: str) -> None:
        for dim in range(min(tensor.dim(), 2)):
            self.atoms.fix(self.atoms.of(tensor, dim), reason)

    def _number_read(self, read: Read) -> None:
        """A constant in the user's code that would be another one in the smaller network."""
        if read.path is None or read.name not in SIZES_OF_LAYERS:
            return
        module = self.graph.model.get_submodule(read.path)
        if layer_kind(module) is not None:
            self._fix_module(module, f"{read.path}.{read.name} is read in forward")

    def _from(self, node: fx.Node) -> Channels:
        """Channels of the first argument."""
        source = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
        if not isinstance(source, fx.Node) or source not in self.channels:
            raise UnclearError(f"{self.graph.words(node)} reads something without channels")
        return self.channels[source]

    def _input(self, node: fx.Node) -> Channels | None:
        shape = self.graph.shapes.get(node, ())
        if len(shape) < 2:
            return None
        return Channels(1, self.atoms.fresh(shape[1], "it is an input of the network"))

    def _attribute(self, node: fx.Node) -> None:
        value = self.graph.attribute(node)
        if isinstance(value, Tensor) and self.atoms.owns(value):
            self._attributes[node] = value
            if value.dim():
                self.atoms.of(value, 0)

    def _conv(self, node: fx.Node) -> Channels:
        module, x = self.graph.module(node), self._at(node, 1)
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.conv._ConvTransposeNd))
        transposed, groups = self.graph.operation(node) == "conv_transpose", module.groups
        if transposed and groups > 1:
            raise UnclearError(f"{self.graph.words(node)} is a transposed convolution with groups")
        inputs, outputs = (0, 1) if transposed else (1, 0)
        read, out = self.atoms.of(module.weight, inputs), self._outputs(module, outputs)
        per_group, filters = len(read), len(out) // groups
        for group in range(groups):
            mine = x.ids[group * per_group : (group + 1) * per_group]
            if groups > 1 and per_group == 1:
                # Depthwise: a channel goes with the filters that read it (and the group disappears).
                self.atoms.unite(mine * filters, out[group * filters : (group + 1) * filters])
            else:
                # Ordinary, or the same positions in every group, so that the groups stay equal.
                self.atoms.unite(mine, read)
                self.atoms.unite(out[group * filters : (group + 1) * filters], out[:filters])
        return Channels(1, out)

    def _linear(self, node: fx.Node) -> Channels:
        module: Any = self.graph.module(node)
        last = len(self.graph.shapes[node]) - 1
        self.atoms.unite(self._at(node, last).ids, self.atoms.of(module.weight, 1))
        return Channels(last, self._outputs(module, 0))

    def _outputs(self, module: Any, dim: int) -> tuple[int, ...]:
        out = self.atoms.of(module.weight, dim)
        if module.bias is not None:
            self.atoms.unite(self.atoms.of(module.bias, 0), out)
        return out

    def _norm(self, node: fx.Node) -> Channels:
        module = self.graph.module(node)
        constant = self.graph.operation(node) == "constant_norm"
        names = ("weight", "bias", "running_mean", "running_var")
        tensors = [tensor for name in names if (tensor := getattr(module, name)) is not None]
        x = self._at(node, 1).ids
        if constant and len(x) != self.graph.shapes[node][1]:
            x = self.atoms.fresh(self.graph.shapes[node][1])  # behind a removed convolution without bias
        for tensor in tensors:
            self.atoms.unite(self.atoms.of(tensor, 0), x)
        return Channels(1, x)

    def _prelu(self, node: fx.Node) -> Channels:
        module, x = self.graph.module(node), self._at(node, 1)
        assert isinstance(module, nn.PReLU)
        if module.num_parameters > 1:
            self.atoms.unite(self.atoms.of(module.weight, 0), x.ids)
        return x

    def _same(self, node: fx.Node) -> Channels | None:
        if not any(source in self.channels for source in node.all_input_nodes):
            if any(source in self._attributes for source in node.all_input_nodes):
                raise UnclearError(f"{self.graph.words(node)} computes with a parameter alone")
            return None
        if len(node.all_input_nodes) > 1:
            raise UnclearError(f"{self.graph.words(node)} has several inputs")
        return self._from(node)

    def _pool(self, node: fx.Node) -> Channels:
        shape, x = self.graph.shapes.get(node, ()), self._from(node)
        source = self.graph.shapes[node.all_input_nodes[0]]
        if len(shape) != len(source) or x.dim != 1 or len(shape) < 3 or shape[:2] != source[:2]:
            raise UnclearError(f"{self.graph.words(node)} does not keep the channels")
        return x

    def _binary(self, node: fx.Node) -> Channels | None:
        rank = len(self.graph.shapes[node])
        sources = [s for s in node.args[:2] if isinstance(s, fx.Node) and s in self.graph.shapes]
        seen: dict[int, list[tuple[int, ...]]] = {}
        for source in sources:
            if source in self.channels:
                channels = self.channels[source]
                seen.setdefault(channels.dim + rank - len(self.graph.shapes[source]), []).append(channels.ids)
        if not seen:
            return self._same(node)
        if len(seen) > 1:
            raise UnclearError(f"{self.graph.words(node)} meets channels along different dimensions")
        (dim, ids), size = next(iter(seen.items())), self.graph.shapes[node][next(iter(seen))]
        whole = [other for other in ids if len(other) == size]
        for source in sources:
            own = dim - (rank - len(self.graph.shapes[source]))
            if source not in self.channels and own >= 0 and self.graph.shapes[source][own] > 1:
                if source not in self._attributes:
                    raise UnclearError(f"{self.graph.words(node)} meets a tensor without known channels")
                whole.append(self.atoms.of(self._attributes[source], own))
        for other in whole[1:]:
            self.atoms.unite(whole[0], other)
        if size > 1 and any(len(other) == 1 for other in ids):
            # One channel that is spread over all (a spatial gate) is no part of them, and cannot go.
            single = [other[0] for other in ids if len(other) == 1]
            self.atoms.fix(single, f"{self.graph.words(node)} spreads it over all")
        return Channels(dim, whole[0])

    def _cat(self, node: fx.Node) -> Channels:
        listed = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        if not isinstance(listed, (list, tuple)) or not isinstance(dim, int):
            raise UnclearError(f"{self.graph.words(node)} of a list that is not written out")
        dim %= len(self.graph.shapes[node])
        parts = []
        for source in listed:
            if not isinstance(source, fx.Node) or source not in self.channels:
                raise UnclearError(f"{self.graph.words(node)} has a part without channels")
            parts.append(self.channels[source])
        if len({part.dim for part in parts}) != 1:
            raise UnclearError(f"{self.graph.words(node)} meets channels along different dimensions")
        if dim == parts[0].dim:
            return Channels(dim, sum((part.ids for part in parts), ()))
        for part in parts[1:]:
            self.atoms.unite(parts[0].ids, part.ids)
        return parts[0]

    def _create(self, node: fx.Node) -> Channels | None:
        """A tensor whose size does not follow any channels; one of it may be spread over them."""
        shape = self.graph.shapes[node]
        if len(shape) < 2:
            return None
        reason = f"{self.graph.words(node)} has {shape[1]} channels whatever the layers have"
        return Channels(1, self.atoms.fresh(shape[1], reason if shape[1] > 1 else None))

    def _tried(self, node: fx.Node) -> Channels:
        """Whatever no rule knows: it is tried whether it works inside each channel."""
        unknown = UnclearError(f"{self.graph.words(node)} is not understood")
        shape = self.graph.shapes.get(node)
        sources = list(node.all_input_nodes)
        if shape is None or not sources or not all(s in self.channels for s in sources):
            raise unknown
        inputs = [(self.graph.shapes[s], self.channels[s].dim) for s in sources]
        size = max(s[dim] for s, dim in inputs)
        rank = max(len(s) for s, _ in inputs)
        places = {dim + rank - len(s) for s, dim in inputs if s[dim] == size}
        if len(places) != 1 or any(len(self.channels[s].ids) not in (1, size) for s in sources):
            raise unknown
        dtype = sources[0].meta["tensor_meta"].dtype
        tensors: list[tuple[Tensor, int]] = []
        if node.op == "call_module":
            module = self.graph.module(node)
            tensors = channel_tensors(module, size)
            others = {id(t) for t in (*module.parameters(), *module.buffers()) if t.numel() > 1}
            plain = tuple(node.args) == tuple(sources) and not node.kwargs
            if not plain or others != {id(t) for t, _ in tensors if t.numel() > 1}:
                raise unknown
            keeps = module_keeps_channels(module, inputs, dtype)
        else:
            device = self.graph.evaluation.inputs.tensors()[0].device
            keeps = keeps_channels(lambda keep, training: calling(node, sources), inputs, dtype, device)
        if not keeps or shape[next(iter(places))] != size:
            raise unknown
        whole = [self.channels[s].ids for s in sources if len(self.channels[s].ids) == size]
        for ids in (*whole[1:], *(self.atoms.of(tensor, dim) for tensor, dim in tensors)):
            self.atoms.unite(whole[0], ids)
        if size > 1:
            spread = [self.channels[s].ids[0] for s in sources if len(self.channels[s].ids) == 1]
            self.atoms.fix(spread, f"{self.graph.words(node)} spreads it over all")
        self.per_channel.add(node)
        return Channels(next(iter(places)), whole[0])

    def _select(self, node: fx.Node) -> Channels:
        module, x = self.graph.module(node), self._at(node, 1)
        assert isinstance(module, ChannelSelect)
        return Channels(1, tuple(x.ids[i] for i in module.channels.tolist()))

    def _scatter(self, node: fx.Node) -> Channels:
        module, x = self.graph.module(node), self._at(node, 1)
        assert isinstance(module, ChannelSelect)
        out = list(self.atoms.fresh(module.size))
        for place, atom in zip(module.channels.tolist(), x.ids, strict=True):
            out[place] = atom
        return Channels(1, tuple(out))

    def _removed_conv(self, node: fx.Node) -> Channels:
        bias = self.graph.module(node).bias
        return Channels(1, self.atoms.of(bias, 0) if isinstance(bias, Tensor) else self.atoms.fresh(1))

    def _at(self, node: fx.Node, dim: int) -> Channels:
        channels = self._from(node)
        if channels.dim != dim:
            raise UnclearError(f"{self.graph.words(node)} does not work along the channels")
        return channels


def calling(node: fx.Node, sources: list[fx.Node]) -> Callable[[list[Tensor]], object]:
    """A function or method as the graph calls it, with other tensors."""

    def call(tensors: list[Tensor]) -> object:
        given = dict(zip(sources, tensors, strict=True))
        args = fx.map_arg(node.args, lambda source: given[source])
        kwargs = fx.map_arg(node.kwargs, lambda source: given[source])
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    return call


_SHAPED: dict[str, Callable[[ChannelFlow, fx.Node, Channels], Channels | None]] = {
    "reshape": reshape,
    "permute": permute,
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    "expand": expand,
    "getitem": getitem,
    "reduce": reduced,
}
