"""The tracer: what a graph holds, what it does not, and that a model does not notice."""

from __future__ import annotations

import gc
import operator
import random
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clicktrain
from clicktrain.graph import Inputs, TraceError, as_inputs, trace_symbolically, working_copy, write_elsewhere
from clicktrain.graph.trace import trace


class Net(nn.Module):
    """Takes an image, maybe in a dict, and a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.cond, self.fc = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, image: Any, cond: Tensor | None = None, *, twice: bool = False) -> Any:
        if isinstance(image, dict):
            image = image["x"]
        x = F.relu(self.norm(self.conv(image))).mean((2, 3))
        if cond is not None:
            x = x + self.cond(cond)
        return {"logits": self.fc(x), "features": 2 * x if twice else x}


X, C = torch.randn(4, 3, 6, 6), torch.randn(4, 4)


@pytest.mark.parametrize(
    ("example", "names", "layers"),
    [
        (X, ["image"], 3),
        ((X, C), ["image", "cond"], 4),
        ((X, None), ["image"], 3),
        ({"image": X}, ["image"], 3),
        ({"cond": C, "image": X}, ["cond", "image"], 4),
        ({"x": X}, ["image_x"], 3),
        (({"x": X}, C), ["image_x", "cond"], 4),
        (Inputs((X,), {"cond": C, "twice": True}), ["image", "cond"], 4),
    ],
    ids=["tensor", "tuple", "None", "keyword", "keywords", "dict", "dict and tensor", "mixed"],
)
def test_examples_of_all_kinds(example: Any, names: list[str], layers: int) -> None:
    graph = trace(Net(), example)
    assert [node.name for node in graph.nodes if node.op == "placeholder"] == names
    called = [node for node in graph.nodes if node.op == "call_module"]
    assert len(called) == layers
    assert graph.shapes[called[0]] == (4, 8, 6, 6)
    assert graph.module(called[0]) is graph.model.conv
    doubled = [node for node in graph.nodes if node.target is operator.mul]
    assert len(doubled) == (len(names) == 2 and layers == 4 and isinstance(example, Inputs))


def test_what_a_dict_means_depends_on_forward() -> None:
    assert as_inputs({"image": X}, Net()).kwargs == {"image": X}
    assert as_inputs({"x": X}, Net()).args[0]["x"] is X
    assert as_inputs([X], Net()).args == ([X],)
    inputs = as_inputs(({"x": X, "k": [C, 3]},))
    assert [place for place, _ in inputs.leaves()] == ["0.x", "0.k.0", "0.k.1"]
    assert inputs.constants() == (("0.k.1", 3),)
    assert inputs.with_tensors((1, 2)).args == ({"x": 1, "k": [2, 3]},)


class Busy(nn.Module):
    """Leaves traces of all kinds."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor
        self.calls, self.kept, self.generator, self.fails = 0, [], torch.Generator(), fails

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.kept.append(x)
        self.seen.add_(1)
        torch.rand(3, generator=self.generator)
        torch.rand(3), random.random(), numpy.random.rand()
        self.last = self.norm(self.conv(x))
        if self.fails and float(self.last.detach().sum()) > 0:
            return x
        return self.last


@pytest.mark.parametrize("training", [True, False, None])
@pytest.mark.parametrize("fails", [True, False])
def test_a_model_does_not_notice(training: bool | None, fails: bool) -> None:
    model = Busy(fails)
    model.norm.eval()
    called: list[int] = []
    model.conv.register_forward_hook(lambda *_: called.append(1))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = set(vars(model))
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index]
    own = model.generator.get_state()
    if fails:
        with pytest.raises(TraceError, match="float"):
            trace(model, X, training=training)
    else:
        graph = trace(model, X, training=training)
        assert graph.effects == {"": "changes .calls at each call"}
    assert (model.calls, model.kept, called, set(vars(model))) == (0, [], [], attributes)
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert numpy.random.get_state()[1].tolist() == generators[2]  # type: ignore[index]
    assert torch.equal(model.generator.get_state(), own)
    assert "__getattribute__" not in nn.Module.__dict__


class Odd(nn.Module):
    """Cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x if float(x.detach().sum()) > 0 else -x


def test_what_cannot_be_traced_is_one_node_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(Odd(), nn.ReLU()))
    graph = trace(model, X)
    assert list(graph.opaque) == ["1.0"]
    assert graph.opaque["1.0"].startswith("TypeError: float()")
    assert graph.entered == ("", "1")
    assert [str(n.target) for n in graph.nodes if n.op == "call_module"] == ["0", "1.0", "1.1"]
    assert [str(n.target) for n in trace_symbolically(model).nodes if n.op == "call_module"] == [
        "0",
        "1.0",
        "1.1",
    ]
    named = trace(model, X, opaque={"1": "it is mine"})
    assert named.opaque == {"1": "it is mine"}


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.alpha = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), 0.5

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) * self.alpha
        y = y.view(-1, self.conv.out_channels, y.shape[2] * y.shape[3]).mean(2)
        y = y + torch.tensor(1.0)
        y += self.conv.weight.shape[0] if self.training else self.fc.in_features
        result: Tensor = self.fc(y)
        return result


def test_values_that_forward_reads_are_known() -> None:
    graph = trace(Reads(), X)
    read = {(r.path, r.name): r.value for r in graph.reads if r.path is not None}
    assert read == {
        ("", "alpha"): 0.5, ("", "training"): False, ("conv", "out_channels"): 8, ("fc", "in_features"): 8
    }  # fmt: skip
    (constant,) = (n for n in graph.nodes if n.op == "get_attr")
    assert float(graph.attribute(constant)) == 1.0
    assert not hasattr(graph.model, str(constant.target))
    assert any(n.target is operator.iadd for n in graph.nodes)
    write_elsewhere(graph.graph)
    assert not any(n.target is operator.iadd for n in graph.nodes)
    assert 64 in graph.sizes.values() or 16 in graph.sizes.values()


def test_a_working_copy_shares_what_is_no_value() -> None:
    model = Busy()
    model.trainer = threading.Lock()
    model.table = {"conv": model.conv, "numbers": [1, 2]}
    model.call = model.norm.forward
    twin = working_copy(model)
    assert twin.trainer is model.trainer
    assert twin.table["conv"] is twin.conv is not model.conv
    assert twin.table["numbers"] == [1, 2]
    assert twin.table["numbers"] is not model.table["numbers"]
    assert twin.call.__self__ is twin.norm
    assert twin.conv.weight is not model.conv.weight
    assert torch.equal(twin.conv.weight, model.conv.weight)
    assert working_copy(model, tensors=False).conv.weight is model.conv.weight


def test_other_threads_are_not_traced() -> None:
    """They call, read and set attributes of the same and of other models while a trace is under way."""
    model, stop, wrong = Net().eval(), threading.Event(), []
    with torch.no_grad():
        expected = model(X)["logits"]

    def work() -> None:
        other = Net().eval()
        while not stop.is_set():
            with torch.no_grad():
                if not torch.equal(model(X)["logits"], expected):
                    wrong.append("output")
                other.label = other(X)["logits"].shape
                if not isinstance(model.conv.weight, nn.Parameter):
                    wrong.append("weight")

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        assert len([n for n in trace(model, (X, C), training=True).nodes if n.op == "call_module"]) == 4
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_there_is_one_tracer() -> None:
    package = Path(clicktrain.__file__).parent
    tracing = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"fx\.Tracer|symbolic_trace\(", path.read_text(encoding="utf-8"))
    ]
    assert tracing == ["graph/tracer.py"]


class Lengths(nn.Module):
    """Asks for the number of images by ``len``, and keeps its settings in slots."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.config = nn.Conv2d(3, 4, 3), Slots(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.view(len(y), self.config.parts, -1)


@dataclass(slots=True)
class Slots:
    parts: int


def test_len_of_a_tensor_is_its_size() -> None:
    before = len
    found = trace(Lengths(), torch.zeros(2, 3, 5, 5))
    assert len is before
    assert not found.opaque
    assert [found.sizes[n] for n in found.nodes if n.target == "size"] == [2]


counted = 0


def count_collections(phase: str, info: dict[str, int]) -> None:
    """A callback of the garbage collector that keeps numbers of its own, as profilers and test tools do."""
    global counted
    counted += phase == "start"


def test_callbacks_of_the_garbage_collector_are_nobodys_code() -> None:
    gc.callbacks.append(count_collections)
    threshold = gc.get_threshold()
    gc.set_threshold(10)
    try:

        class Allocating(Reads):
            def forward(self, x: Tensor) -> Tensor:
                assert len([[i] for i in range(5000)]) == 5000
                return super().forward(x)

        graph = trace(Allocating(), X)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(count_collections)
    assert counted
    assert "counted" not in {read.name for read in graph.reads}
    assert gc.isenabled()
