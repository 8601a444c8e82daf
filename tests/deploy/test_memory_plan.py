"""Activations of exported networks: together in memory, but for results in place of what is added."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from clicktrain.inference.capture import capture
from clicktrain.inference.memory_plan import places, single_size
from clicktrain.inference.program import Conv, Program, Value
from clicktrain.models import create_model


def size_of(value: Value) -> int:
    return value.size


class Twice(nn.Module):
    """What is added is needed again, is what is convolved, or has a chain behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1) for _ in range(7)])

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.convs[0](x))
        b = self.convs[1](self.convs[2](a)) + a  # `a` is needed below
        c = self.convs[3](b) + b
        d = self.convs[4](torch.sigmoid(c)) + c
        e = torch.relu(self.convs[5](torch.tanh(d)) + d)
        y: Tensor = self.convs[6](e) + a
        return y


def program_of(name: str) -> Program:
    torch.manual_seed(0)
    if name == "twice":
        return capture(Twice().eval(), (4, 8, 8))
    model = create_model(name, num_classes=3, width=0.25, stem="cifar")
    return capture(model.eval(), (3, 32, 32))


@pytest.mark.parametrize("name", ["twice", "resnet8", "resnet18", "resnet50", "mobilenet_v3_small", "vgg11"])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_needed_together_lies_apart(name: str, in_place: bool) -> None:
    program = program_of(name)
    size = size_of if in_place else single_size
    found, total = places(program, size, in_place)
    assert list(found) == program.values
    together = {(op.residual, op.output) for op in program.ops if isinstance(op, Conv)} if in_place else set()
    last = {value: place for place, op in enumerate(program.ops) for value in (*op.inputs(), op.output)}
    last[program.output] = len(program.ops)
    alive = {program.input}
    for place, op in enumerate(program.ops):
        alive.add(op.output)
        for one in alive:
            assert found[one] + size(one) <= total
            for other in alive:
                apart = found[one] + size(one) <= found[other] or found[other] + size(other) <= found[one]
                same = found[one] == found[other] and {(one, other), (other, one)} & together
                assert one is other or apart or (same and {one, other} == {op.residual, op.output})
        alive = {value for value in alive if last[value] > place}


@pytest.mark.parametrize(("name", "count"), [("twice", 3), ("resnet18", 4), ("vgg11", 0)])
def test_large_results_take_the_place_of_what_is_added(name: str, count: int) -> None:
    program = program_of(name)
    found, total = places(program, size_of, in_place=True)
    added = [op for op in program.ops if isinstance(op, Conv) and op.residual is not None]
    assert sum(found[op.output] == found[op.residual] for op in added if op.residual) == count
    assert (total < places(program, size_of)[1]) == (count > 0)
